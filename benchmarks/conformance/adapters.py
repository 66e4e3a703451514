"""One small class for each Adam: what a probe needs of it, said in its library's own words.

A library is imported when an adapter is made, so that this file can be read without any of them.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
Settings = dict[str, Any]


class NotOffered(Exception):
    """The library has no notion of what a probe asks for; the message says of what."""


class Sparse(NamedTuple):
    """The gradient of some rows; an id may come more than once."""

    ids: Array
    values: Array


class Adapter:
    """One optimizer on named variables of a type; they and gradients come as float32 arrays.

    Settings are named as in Keras. learning_rate, beta_1, beta_2 and epsilon are always there.
    """

    # What else the optimizer itself can express: by an argument, by groups of parameters, or
    # ("schedule") by its library's own way to change the learning rate; "excluded" are the indices
    # of the variables without weight decay.
    takes: ClassVar[frozenset[str]] = frozenset()
    sparse: ClassVar[bool] = False  # whether the library has sparse gradients
    saves: ClassVar[str] = ""  # how state is saved and loaded

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        raise NotImplementedError

    def step(self, gradients: Sequence[Any]) -> None:
        raise NotImplementedError

    def values(self) -> list[Array]:
        raise NotImplementedError

    def zero(self) -> None:
        """Set all variables to 0, so that after a step they are that step's update."""
        raise NotImplementedError

    def save(self) -> bytes:
        raise NotOffered("no state that could be saved")

    def load(self, saved: bytes) -> None:
        raise NotOffered("no state that could be loaded")


def constant_or(schedules: Any, rate: Any) -> Any:
    """The rate, or the schedule of tests/cases.py as one of a module like Keras's."""
    if not callable(rate):
        return rate
    return schedules.InverseTimeDecay(rate.initial_learning_rate, rate.decay_steps, rate.decay_rate)


# What Keras documents; InverseTimeDecay among it.
KERAS = frozenset(
    {
        *("schedule", "amsgrad", "weight_decay", "excluded", "clipnorm", "clipvalue"),
        *("global_clipnorm", "use_ema", "ema_momentum", "ema_overwrite_frequency"),
        *("loss_scale_factor", "gradient_accumulation_steps"),
    }
)


class OmniNumPy(Adapter):
    takes = KERAS
    sparse = True
    saves = "pickle"

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import ml_dtypes

        import omniadam

        excluded = settings.pop("excluded", ())
        settings["learning_rate"] = constant_or(omniadam.schedules, settings["learning_rate"])
        self.dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        self.variables = {name: np.array(v, self.dtype) for name, v in values.items()}
        self.opt = omniadam.Adam(**settings)
        held = list(self.variables.values())
        self.opt.exclude_from_weight_decay(var_list=[held[i] for i in excluded])
        self.opt.build(self.variables)

    def gradient(self, g: Any, w: Array) -> Any:
        import omniadam

        if isinstance(g, Sparse):
            return omniadam.IndexedSlices(np.array(g.values, self.dtype), g.ids, w.shape)
        return np.array(g, self.dtype)

    def step(self, gradients: Sequence[Any]) -> None:
        pairs = zip(gradients, self.variables.values(), strict=True)
        self.opt.apply_gradients([(self.gradient(g, w), w) for g, w in pairs])

    def values(self) -> list[Array]:
        return [w.astype(np.float32) for w in self.variables.values()]

    def zero(self) -> None:
        for w in self.variables.values():
            w[...] = 0

    def save(self) -> bytes:
        return pickle.dumps(self.opt)

    def load(self, saved: bytes) -> None:
        self.opt = pickle.loads(saved)
        self.opt.build(self.variables)


# --- torch, and what has the interface of its optimizers -----------------------------------------


class Torch(Adapter):
    takes = frozenset({"schedule", "amsgrad", "weight_decay", "excluded"})
    sparse = True
    saves = "state_dict"
    named = True  # whether groups may hold (name, parameter)
    arguments: ClassVar[Settings] = {}

    @staticmethod
    def classes() -> tuple[Any, Any]:
        """Without and with decoupled weight decay."""
        import torch

        return torch.optim.Adam, torch.optim.AdamW

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import torch

        self.dtype = getattr(torch, dtype)
        self.params = {
            name: torch.nn.Parameter(torch.tensor(v).to(self.dtype)) for name, v in values.items()
        }
        rate, excluded = settings.pop("learning_rate"), settings.pop("excluded", ())
        self.calls = 0
        self.schedule = rate if callable(rate) else None
        pairs: list[Any] = list(self.params.items() if self.named else self.params.values())
        groups: list[Any] = [{"params": [p for i, p in enumerate(pairs) if i not in excluded]}]
        if excluded:
            groups.append({"params": [pairs[i] for i in sorted(excluded)], "weight_decay": 0.0})
        betas, eps = (settings.pop("beta_1"), settings.pop("beta_2")), settings.pop("epsilon")
        of_torch = {
            "lr": self.rate() if self.schedule else rate,
            "betas": betas,
            "eps": eps,
            **settings,
        }
        self.opt = self.optimizer(groups, of_torch)

    def optimizer(self, groups: list[Any], settings: Settings) -> Any:
        return self.classes()["weight_decay" in settings](groups, **settings, **self.arguments)

    def rate(self) -> Any:
        assert self.schedule is not None
        return self.schedule(self.calls)

    def gradient(self, g: Any, p: Any) -> Any:
        import torch

        if isinstance(g, Sparse):
            values = torch.tensor(g.values).to(self.dtype)
            return torch.sparse_coo_tensor(torch.tensor(g.ids)[None], values, p.shape)
        return torch.tensor(g).to(self.dtype)

    def step(self, gradients: Sequence[Any]) -> None:
        import torch

        for g, p in zip(gradients, self.params.values(), strict=True):
            p.grad = self.gradient(g, p)
        for group in self.opt.param_groups if self.schedule else ():
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.rate())
            else:
                group["lr"] = self.rate()
        self.once()
        self.calls += 1

    def once(self) -> None:
        self.opt.step()

    def values(self) -> list[Array]:
        return [p.detach().float().numpy().copy() for p in self.params.values()]

    def zero(self) -> None:
        for p in self.params.values():
            p.detach().zero_()

    def save(self) -> bytes:
        import torch

        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        import torch

        # What is loaded was written by this very process.
        self.opt.load_state_dict(torch.load(io.BytesIO(saved), weights_only=False))


class TorchLoop(Torch):
    arguments: ClassVar[Settings] = {"foreach": False}


class TorchForeach(Torch):
    arguments: ClassVar[Settings] = {"foreach": True}


class TorchFused(Torch):
    arguments: ClassVar[Settings] = {"fused": True}


class TorchCompiled(Torch):
    """As PyTorch's tutorials have it: the step is compiled, and a rate that changes is a tensor."""

    def optimizer(self, groups: list[Any], settings: Settings) -> Any:
        import torch

        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise NotOffered("no C++ compiler found")
        if self.schedule:
            settings["lr"] = torch.tensor(settings["lr"])
        torch._dynamo.reset()
        opt = super().optimizer(groups, settings)
        self.compiled = torch.compile(opt.step)
        return opt

    def once(self) -> None:
        self.compiled()


class TorchSparse(Torch):
    """`SparseAdam` takes sparse gradients only: a dense one is given as all of its rows."""

    takes = frozenset({"schedule"})

    @staticmethod
    def classes() -> tuple[Any, Any]:
        import torch

        return torch.optim.SparseAdam, None

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        self.shapes = [v.shape for v in values.values()]
        values = {name: np.atleast_1d(v) for name, v in values.items()}
        super().__init__(values, dtype, settings)

    def gradient(self, g: Any, p: Any) -> Any:
        if not isinstance(g, Sparse):
            g = Sparse(np.arange(len(p)), np.reshape(g, p.shape))
        return super().gradient(g, p)

    def values(self) -> list[Array]:
        return [v.reshape(s) for v, s in zip(super().values(), self.shapes, strict=True)]


class OmniTorch(Torch):
    takes = Torch.takes | KERAS & {
        *("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum")
    }

    @staticmethod
    def classes() -> tuple[Any, Any]:
        import omniadam.torch

        return omniadam.torch.Adam, omniadam.torch.AdamW


class Optimi(Torch):
    takes = frozenset({"schedule", "weight_decay", "excluded"})
    sparse = False
    named = False

    def optimizer(self, groups: list[Any], settings: Settings) -> Any:
        import optimi

        return optimi.Adam(groups, decouple_wd="weight_decay" in settings, **settings)


class PyTorchOptimizer(Torch):
    @staticmethod
    def classes() -> tuple[Any, Any]:
        import pytorch_optimizer

        return pytorch_optimizer.Adam, pytorch_optimizer.AdamW


class FlashAdamW(Optimi):
    def optimizer(self, groups: list[Any], settings: Settings) -> Any:
        import pytorch_optimizer

        # 32 bits of a narrow weight are kept in all; for float32 the argument is refused.
        bits = None if self.dtype.itemsize == 4 else 32
        settings = {"weight_decay": 0.0, "quantize": False, "master_weight_bits": bits, **settings}
        return pytorch_optimizer.FlashAdamW(groups, **settings)


class TorchAO(Torch):
    sparse = False
    named = False

    def optimizer(self, groups: list[Any], settings: Settings) -> Any:
        from torchao.optim import _AdamW

        return _AdamW(groups, bf16_stochastic_round=True, **{"weight_decay": 0.0, **settings})


class BitsAndBytes(Torch):
    takes = frozenset({"schedule", "weight_decay", "excluded"})
    sparse = False
    named = False

    @staticmethod
    def classes() -> tuple[Any, Any]:
        import bitsandbytes

        return bitsandbytes.optim.Adam, bitsandbytes.optim.AdamW


# --- Keras and tf_keras --------------------------------------------------------------------------


class Keras(Adapter):
    takes = KERAS
    saves = "save_own_variables"

    @staticmethod
    def cls() -> Any:
        import keras

        return keras.optimizers.Adam

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import keras

        self.dtype = dtype
        self.variables = {
            name: keras.Variable(v, dtype=dtype, name=name) for name, v in values.items()
        }
        excluded = settings.pop("excluded", ())
        schedules = keras.optimizers.schedules
        settings["learning_rate"] = constant_or(schedules, settings["learning_rate"])
        self.opt = self.cls()(**settings)
        held = list(self.variables.values())
        self.opt.exclude_from_weight_decay(var_list=[held[i] for i in excluded])
        self.opt.build(held)

    def gradient(self, g: Any, w: Any) -> Any:
        import keras

        if isinstance(g, Sparse):
            import tensorflow as tf

            values = tf.cast(tf.constant(g.values), self.dtype)
            return tf.IndexedSlices(values, tf.constant(g.ids), w.shape)
        return keras.ops.convert_to_tensor(g, dtype=self.dtype)

    def step(self, gradients: Sequence[Any]) -> None:
        pairs = zip(gradients, self.variables.values(), strict=True)
        self.opt.apply_gradients([(self.gradient(g, w), w) for g, w in pairs])

    def values(self) -> list[Array]:
        import keras

        host = keras.ops.convert_to_numpy
        return [np.array(host(keras.ops.cast(w, "float32"))) for w in self.variables.values()]

    def zero(self) -> None:
        for w in self.variables.values():
            w.assign(np.zeros(w.shape, np.float32))

    def save(self) -> bytes:
        import keras

        store: dict[str, Any] = {}
        self.opt.save_own_variables(store)
        return pickle.dumps({k: np.array(keras.ops.convert_to_numpy(v)) for k, v in store.items()})

    def load(self, saved: bytes) -> None:
        self.opt.load_own_variables(pickle.loads(saved))


class KerasTensorFlow(Keras):
    sparse = True


class OmniKeras(Keras):
    @staticmethod
    def cls() -> Any:
        import omniadam.keras

        return omniadam.keras.Adam


class OmniKerasTensorFlow(OmniKeras):
    sparse = True


class TFKeras(Adapter):
    # Without ema_overwrite_frequency: its average starts from the weights, not from the first
    # step's, so that the weights it leaves are others by design. An average alone is there.
    takes = KERAS - {
        *("ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps")
    }
    sparse = True
    saves = "tf.train.Checkpoint"

    @staticmethod
    def cls() -> Any:
        import tf_keras

        return tf_keras.optimizers.Adam

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import tensorflow as tf
        import tf_keras

        self.dtype = dtype
        self.variables = {
            name: tf.Variable(tf.cast(v, dtype), name=name) for name, v in values.items()
        }
        excluded = settings.pop("excluded", ())
        schedules = tf_keras.optimizers.schedules
        settings["learning_rate"] = constant_or(schedules, settings["learning_rate"])
        self.opt = self.cls()(**settings)
        if excluded:
            held = list(self.variables.values())
            self.opt.exclude_from_weight_decay(var_list=[held[i] for i in excluded])

    def gradient(self, g: Any, w: Any) -> Any:
        import tensorflow as tf

        if isinstance(g, Sparse):
            values = tf.cast(tf.constant(g.values), self.dtype)
            return tf.IndexedSlices(values, tf.constant(g.ids), tf.constant(w.shape))
        return tf.cast(tf.constant(g), self.dtype)

    def step(self, gradients: Sequence[Any]) -> None:
        pairs = zip(gradients, self.variables.values(), strict=True)
        self.opt.apply_gradients([(self.gradient(g, w), w) for g, w in pairs])

    def values(self) -> list[Array]:
        return [w.numpy().astype(np.float32) for w in self.variables.values()]

    def zero(self) -> None:
        for w in self.variables.values():
            w.assign(w * 0)

    def save(self) -> bytes:
        import tensorflow as tf

        with tempfile.TemporaryDirectory() as folder:
            tf.train.Checkpoint(opt=self.opt, **self.variables).write(f"{folder}/state")
            files = {name: _read(f"{folder}/{name}") for name in os.listdir(folder)}
        return pickle.dumps(files)

    def load(self, saved: bytes) -> None:
        import tensorflow as tf

        # For as long as the adapter: what has no variable yet is read when it has.
        self.folder = tempfile.TemporaryDirectory()
        for name, content in pickle.loads(saved).items():
            with open(f"{self.folder.name}/{name}", "wb") as file:
                file.write(content)
        if hasattr(self.opt, "build"):
            self.opt.build(list(self.variables.values()))
        read = tf.train.Checkpoint(opt=self.opt, **self.variables)
        read.read(f"{self.folder.name}/state")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class TFKerasLegacy(TFKeras):
    takes = frozenset({"schedule", "amsgrad", "clipnorm", "clipvalue", "global_clipnorm"})

    @staticmethod
    def cls() -> Any:
        import tf_keras

        return tf_keras.optimizers.legacy.Adam


# --- JAX -----------------------------------------------------------------------------------------


class Optax(Adapter):
    """Parameters are a dict: a tree of JAX, which finds its leaves by name."""

    takes = frozenset({"schedule", "weight_decay", "excluded"})
    saves = "pickle of the state's tree"

    @staticmethod
    def module() -> Any:
        import optax

        return optax

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        self.dtype = jnp.dtype(dtype)
        self.params = {name: jnp.asarray(v, self.dtype) for name, v in values.items()}
        rate, excluded = settings.pop("learning_rate"), settings.pop("excluded", ())
        rates = (settings.pop("beta_1"), settings.pop("beta_2"), settings.pop("epsilon"))
        if "weight_decay" in settings:
            mask = {name: i not in excluded for i, name in enumerate(self.params)}
            self.tx = self.module().adamw(rate, *rates, mask=mask, **settings)
        else:
            self.tx = self.module().adam(rate, *rates, **settings)
        self.state = self.tx.init(self.params)

        @jax.jit
        def step(grads: Any, state: Any, params: Any) -> Any:
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.jitted = step

    def step(self, gradients: Sequence[Any]) -> None:
        import jax.numpy as jnp

        pairs = zip(self.params, gradients, strict=True)
        grads = {name: jnp.asarray(g, self.dtype) for name, g in pairs}
        # A dict comes out of JAX in the order of its names.
        params, self.state = self.jitted(grads, self.state, self.params)
        self.params = {name: params[name] for name in self.params}

    def values(self) -> list[Array]:
        return [np.array(w, np.float32) for w in self.params.values()]

    def zero(self) -> None:
        self.params = {name: w * 0 for name, w in self.params.items()}

    def save(self) -> bytes:
        import jax

        return pickle.dumps(jax.tree.map(np.asarray, self.state))

    def load(self, saved: bytes) -> None:
        self.state = pickle.loads(saved)


class OmniOptax(Optax):
    @staticmethod
    def module() -> Any:
        import omniadam.optax

        return omniadam.optax


class JaxExample(Adapter):
    takes = frozenset({"schedule"})
    saves = "unpack_optimizer_state"

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import jax
        import jax.numpy as jnp
        from jax.example_libraries import optimizers

        rate = settings["learning_rate"]
        if callable(rate):
            rate = optimizers.inverse_time_decay(
                rate.initial_learning_rate, rate.decay_steps, rate.decay_rate
            )
        init, update, self.get = optimizers.adam(
            rate, settings["beta_1"], settings["beta_2"], settings["epsilon"]
        )
        self.names, self.dtype, self.calls = list(values), jnp.dtype(dtype), 0
        self.state = init({name: jnp.asarray(v, self.dtype) for name, v in values.items()})
        self.update = jax.jit(update)

    def step(self, gradients: Sequence[Any]) -> None:
        import jax.numpy as jnp

        pairs = zip(self.names, gradients, strict=True)
        grads = {name: jnp.asarray(g, self.dtype) for name, g in pairs}
        self.state = self.update(self.calls, grads, self.state)
        self.calls += 1

    def values(self) -> list[Array]:
        params = self.get(self.state)
        return [np.array(params[name], np.float32) for name in self.names]

    def zero(self) -> None:
        trees = self.trees()
        self.pack({name: (tree[0] * 0, *tree[1:]) for name, tree in trees.items()})

    def trees(self) -> Any:
        from jax.example_libraries import optimizers

        marked = optimizers.unpack_optimizer_state(self.state)
        return {name: tuple(np.asarray(x) for x in marked[name].subtree) for name in self.names}

    def pack(self, trees: Any) -> None:
        from jax.example_libraries import optimizers

        marked = {name: optimizers.JoinPoint(tree) for name, tree in trees.items()}
        self.state = optimizers.pack_optimizer_state(marked)

    def save(self) -> bytes:
        return pickle.dumps((self.calls, self.trees()))

    def load(self, saved: bytes) -> None:
        self.calls, trees = pickle.loads(saved)
        self.pack(trees)


# --- NumPy ---------------------------------------------------------------------------------------


def _no_bfloat16(dtype: str) -> np.dtype[Any]:
    if dtype == "bfloat16":
        raise NotOffered("NumPy has no bfloat16")
    return np.dtype(dtype)


class ScikitLearn(Adapter):
    """The optimizer inside of `MLPClassifier` and `MLPRegressor`."""

    saves = "pickle"

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

        self.dtype = _no_bfloat16(dtype)
        self.params = [np.array(v, self.dtype) for v in values.values()]
        settings["learning_rate_init"] = settings.pop("learning_rate")
        self.opt = AdamOptimizer(self.params, **settings)

    def step(self, gradients: Sequence[Any]) -> None:
        self.opt.update_params(self.params, [np.array(g, self.dtype) for g in gradients])

    def values(self) -> list[Array]:
        return [np.array(p, np.float32) for p in self.params]

    def zero(self) -> None:
        for p in self.params:
            p[...] = 0

    def save(self) -> bytes:
        return pickle.dumps(self.opt)

    def load(self, saved: bytes) -> None:
        self.opt = pickle.loads(saved)


class Autograd(Adapter):
    """A function that makes all steps: what comes is kept, and run when values are asked for."""

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        self.dtype = _no_bfloat16(dtype)
        self.start = [np.array(v, self.dtype) for v in values.values()]
        self.numbers = tuple(
            settings.pop(k) for k in ("learning_rate", "beta_1", "beta_2", "epsilon")
        )
        self.gradients: list[list[Array]] = []

    def step(self, gradients: Sequence[Any]) -> None:
        self.gradients.append([np.array(g, self.dtype) for g in gradients])

    def values(self) -> list[Array]:
        from autograd.misc.optimizers import adam

        steps = len(self.gradients)
        ended = adam(lambda x, i: self.gradients[i], self.start, None, steps, *self.numbers)
        return [np.array(w, np.float32) for w in ended]

    def zero(self) -> None:
        raise NotOffered("variables cannot be set between steps")


class Thinc(Adapter):
    """`clipnorm` is its `grad_clip`; 0 turns it and the average off."""

    takes = frozenset({"clipnorm"})
    saves = "pickle"

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        from thinc.api import Adam

        self.dtype = _no_bfloat16(dtype)
        # An array without axes is refused.
        self.shapes = [v.shape for v in values.values()]
        self.params = {name: np.array(v, self.dtype, ndmin=1) for name, v in values.items()}
        self.opt = Adam(
            settings["learning_rate"],
            beta1=settings["beta_1"],
            beta2=settings["beta_2"],
            eps=settings["epsilon"],
            L2=0.0,
            grad_clip=settings.get("clipnorm", 0.0),
            use_averages=False,
        )

    def step(self, gradients: Sequence[Any]) -> None:
        for (name, w), g in zip(self.params.items(), gradients, strict=True):
            gradient = np.array(g, self.dtype).reshape(w.shape)
            self.params[name], _ = self.opt((0, name), w, gradient)
        self.opt.step_schedules()

    def values(self) -> list[Array]:
        pairs = zip(self.params.values(), self.shapes, strict=True)
        return [np.array(w, np.float32).reshape(shape) for w, shape in pairs]

    def zero(self) -> None:
        for p in self.params.values():
            p[...] = 0

    def save(self) -> bytes:
        return pickle.dumps(self.opt)

    def load(self, saved: bytes) -> None:
        self.opt = pickle.loads(saved)


# --- Other frameworks ----------------------------------------------------------------------------


class MLX(Adapter):
    """With `bias_correction=True`: without it, which is the default, it is another update."""

    takes = frozenset({"schedule", "weight_decay"})
    saves = "pickle of the state's tree"

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import mlx.core as mx
        import mlx.optimizers as optim

        self.mx, self.dtype = mx, getattr(mx, dtype)
        self.params = {name: mx.array(v).astype(self.dtype) for name, v in values.items()}
        rate = settings["learning_rate"]
        if callable(rate):
            initial, steps, decay = rate.initial_learning_rate, rate.decay_steps, rate.decay_rate
            settings["learning_rate"] = lambda calls: initial / (1 + decay * calls / steps)
        decays = {"weight_decay": settings["weight_decay"]} if "weight_decay" in settings else {}
        self.opt = (optim.AdamW if decays else optim.Adam)(
            settings["learning_rate"],
            betas=[settings["beta_1"], settings["beta_2"]],
            eps=settings["epsilon"],
            bias_correction=True,
            **decays,
        )

    def step(self, gradients: Sequence[Any]) -> None:
        pairs = zip(self.params, gradients, strict=True)
        grads = {name: self.mx.array(g).astype(self.dtype) for name, g in pairs}
        self.params = self.opt.apply_gradients(grads, self.params)
        self.mx.eval(self.params, self.opt.state)

    def values(self) -> list[Array]:
        return [np.array(w.astype(self.mx.float32)) for w in self.params.values()]

    def zero(self) -> None:
        self.params = {name: self.mx.zeros_like(w) for name, w in self.params.items()}

    def save(self) -> bytes:
        from mlx.utils import tree_flatten

        return pickle.dumps([(name, np.array(v)) for name, v in tree_flatten(self.opt.state)])

    def load(self, saved: bytes) -> None:
        from mlx.utils import tree_unflatten

        self.opt.state = tree_unflatten(
            [(name, self.mx.array(v)) for name, v in pickle.loads(saved)]
        )


class Paddle(Adapter):
    takes = KERAS & {
        *("schedule", "amsgrad", "weight_decay", "excluded"),
        *("clipnorm", "clipvalue", "global_clipnorm"),
    }
    sparse = True
    saves = "state_dict"
    made: ClassVar[int] = 0

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        import paddle

        self.paddle, self.dtype = paddle, dtype
        # A name is taken once in a process, where another run of a script would have it again.
        Paddle.made += 1
        self.prefix = f"p{Paddle.made}_"
        start = paddle.nn.initializer.Constant(0.0)
        self.params = {
            name: paddle.create_parameter(
                v.shape, dtype, name=self.prefix + name, default_initializer=start
            )
            for name, v in values.items()
        }
        for p, v in zip(self.params.values(), values.values(), strict=True):
            p.set_value(paddle.to_tensor(v).astype(dtype))
        rate, excluded = settings["learning_rate"], settings.pop("excluded", ())
        self.schedule = None
        if callable(rate):
            rate = self.schedule = paddle.optimizer.lr.LambdaDecay(1.0, rate)
        more: Settings = {"amsgrad": settings.get("amsgrad", False)}
        for name, clip in (
            ("clipnorm", paddle.nn.ClipGradByNorm),
            ("clipvalue", paddle.nn.ClipGradByValue),
            ("global_clipnorm", paddle.nn.ClipGradByGlobalNorm),
        ):
            if name in settings:
                more["grad_clip"] = clip(settings[name])
        cls = paddle.optimizer.Adam
        if "weight_decay" in settings:
            cls = paddle.optimizer.AdamW
            without = {self.prefix + name for i, name in enumerate(self.params) if i in excluded}
            more["weight_decay"] = settings["weight_decay"]
            more["apply_decay_param_fun"] = lambda name: name not in without
        self.opt = cls(
            rate,
            settings["beta_1"],
            settings["beta_2"],
            settings["epsilon"],
            parameters=list(self.params.values()),
            **more,
        )

    def step(self, gradients: Sequence[Any]) -> None:
        """Gradients come from a backward pass: of w * g, or of a lookup."""
        paddle = self.paddle
        for g, p in zip(gradients, self.params.values(), strict=True):
            if isinstance(g, Sparse):
                rows = paddle.nn.functional.embedding(paddle.to_tensor(g.ids), p, sparse=True)
                (rows * paddle.to_tensor(g.values).astype(self.dtype)).sum().backward()
            elif p.size:
                (p * paddle.to_tensor(g).astype(self.dtype)).sum().backward()
        self.opt.step()
        self.opt.clear_grad()
        if self.schedule:
            self.schedule.step()

    def values(self) -> list[Array]:
        return [np.array(p.astype("float32").numpy()) for p in self.params.values()]

    def zero(self) -> None:
        for p in self.params.values():
            p.set_value(self.paddle.zeros_like(p))

    def save(self) -> bytes:
        state = self.opt.state_dict()
        return pickle.dumps(
            {
                k.removeprefix(self.prefix): v.numpy() if hasattr(v, "numpy") else v
                for k, v in state.items()
            }
        )

    def load(self, saved: bytes) -> None:
        state = pickle.loads(saved)
        self.opt.set_state_dict(
            {
                self.prefix + k: self.paddle.to_tensor(v) if isinstance(v, np.ndarray) else v
                for k, v in state.items()
            }
        )


class TinyGrad(Adapter):
    takes = frozenset({"schedule", "weight_decay"})
    saves = "get_state_dict"

    def __init__(self, values: Arrays, dtype: str, settings: Settings) -> None:
        from tinygrad import Tensor, dtypes, nn

        Tensor.training = True
        self.tensor, self.dtype = Tensor, getattr(dtypes, dtype)
        self.floats = dtypes.float32
        self.params = {
            name: Tensor(v).cast(self.dtype).contiguous().realize() for name, v in values.items()
        }
        rate = settings["learning_rate"]
        self.calls, self.schedule = 0, rate if callable(rate) else None
        decays = {"weight_decay": settings["weight_decay"]} if "weight_decay" in settings else {}
        self.opt = (nn.optim.AdamW if decays else nn.optim.Adam)(
            list(self.params.values()),
            self.schedule(0) if self.schedule else rate,
            settings["beta_1"],
            settings["beta_2"],
            settings["epsilon"],
            **decays,
        )

    def step(self, gradients: Sequence[Any]) -> None:
        for g, p in zip(gradients, self.params.values(), strict=True):
            p.grad = self.tensor(g).cast(self.dtype).realize()
        if self.schedule:
            self.opt.lr.assign(self.tensor([self.schedule(self.calls)])).realize()
        self.opt.step()
        self.calls += 1

    def values(self) -> list[Array]:
        return [p.detach().cast(self.floats).numpy() for p in self.params.values()]

    def zero(self) -> None:
        for p in self.params.values():
            p.assign(p.zeros_like()).realize()

    def save(self) -> bytes:
        from tinygrad.nn.state import get_state_dict

        return pickle.dumps({k: v.numpy() for k, v in get_state_dict(self.opt).items()})

    def load(self, saved: bytes) -> None:
        from tinygrad.nn.state import load_state_dict

        state = {k: self.tensor(v) for k, v in pickle.loads(saved).items()}
        load_state_dict(self.opt, state, verbose=False)


# --- The rows ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What is measured, in which environment, the packages whose versions are printed, what the
    process finds in its environment variables, and what a reader should know.
    """

    kind: type[Adapter]
    environment: str
    packages: tuple[str, ...]
    variables: Mapping[str, str] = {}
    note: str = ""


def _keras(name: str, kind: type[Adapter], sparse: type[Adapter], environment: str) -> Any:
    for backend, label, package in (
        ("numpy", "NumPy", "numpy"),
        ("jax", "JAX", "jax"),
        ("torch", "PyTorch", "torch"),
        ("tensorflow", "TensorFlow", "tensorflow_cpu"),
    ):
        used = sparse if backend == "tensorflow" else kind
        packages = ("keras", package)
        yield f"{name} on {label}", Row(used, environment, packages, {"KERAS_BACKEND": backend})


_OPTIMIZER = ("pytorch_optimizer", "torch")
ROWS: dict[str, Row] = {
    "omniadam on NumPy": Row(OmniNumPy, "omniadam", ("numpy", "numba"), note="`omniadam.Adam`."),
    "omniadam.torch": Row(OmniTorch, "omniadam", ("torch",)),
    "omniadam.optax": Row(OmniOptax, "omniadam", ("optax", "jax")),
    **dict(_keras("omniadam.keras", OmniKeras, OmniKerasTensorFlow, "omniadam")),
    "torch, for-loop": Row(TorchLoop, "torch", ("torch",), note="`foreach=False`."),
    "torch, foreach": Row(TorchForeach, "torch", ("torch",)),
    "torch, fused": Row(TorchFused, "torch", ("torch",)),
    "torch, compiled": Row(TorchCompiled, "torch", ("torch",), note="`torch.compile(opt.step)`."),
    "torch SparseAdam": Row(
        TorchSparse,
        "torch",
        ("torch",),
        note="a dense gradient is given as a sparse one of all rows.",
    ),
    "optax": Row(Optax, "optax", ("optax", "jax"), note="compiled by `jax.jit`."),
    **dict(_keras("Keras", Keras, KerasTensorFlow, "keras")),
    "tf_keras": Row(
        TFKeras,
        "tf_keras",
        ("tf_keras", "tensorflow_cpu"),
        note="without `ema_overwrite_frequency`: its average starts elsewhere, by design.",
    ),
    "tf_keras legacy": Row(TFKerasLegacy, "tf_keras", ("tf_keras", "tensorflow_cpu")),
    "jax.example_libraries": Row(JaxExample, "jax", ("jax",), note="compiled by `jax.jit`."),
    "scikit-learn": Row(
        ScikitLearn,
        "scikit-learn",
        ("scikit-learn",),
        note="`AdamOptimizer`, which is inside of `MLPClassifier`. It is not a public class.",
    ),
    "HIPS autograd": Row(
        Autograd,
        "autograd",
        ("autograd",),
        note="`autograd.misc.optimizers.adam`, one function for all steps: it keeps its variables.",
    ),
    "thinc": Row(Thinc, "thinc", ("thinc",)),
    "MLX": Row(
        MLX,
        "mlx",
        ("mlx",),
        note="with `bias_correction=True`. The default, without it, is not asked for here.",
    ),
    "Paddle": Row(
        Paddle,
        "paddle",
        ("paddlepaddle",),
        note="with sparse gradients its first step is 0.744 of the learning rate, which is what a "
        "second step makes of a row's first gradient: so these numbers are not the oracle's.",
    ),
    "tinygrad": Row(
        TinyGrad, "tinygrad", ("tinygrad",), note="its CPU device needs the compiler clang."
    ),
    "optimi": Row(
        Optimi,
        "optimi",
        ("torch-optimi", "torch"),
        note="with what it chooses for itself: Kahan summation of 16-bit weights.",
    ),
    "pytorch_optimizer": Row(
        PyTorchOptimizer,
        "pytorch_optimizer",
        _OPTIMIZER,
        note="its `Adam` and `AdamW` are those of `torch.optim`.",
    ),
    "pytorch_optimizer FlashAdamW": Row(
        FlashAdamW,
        "pytorch_optimizer",
        _OPTIMIZER,
        note="`quantize=False`, and of 16-bit weights `master_weight_bits=32`.",
    ),
    "bitsandbytes": Row(
        BitsAndBytes,
        "bitsandbytes",
        ("bitsandbytes", "torch"),
        note="`Adam` and `AdamW`, not those with 8-bit state.",
    ),
    "torchao": Row(
        TorchAO,
        "torchao",
        ("torchao", "torch"),
        note="`_AdamW(bf16_stochastic_round=True)`, its form without 8-bit state.",
    ),
}
