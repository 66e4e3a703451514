"""Plant faults one by one, and see that the tests named for each find it.

    python tests/mutations.py [WORD ...]

With words, only the faults in whose file or line one of them occurs. The sources are copied to a
temporary folder first. A fault that no test finds is printed, and the exit status is 1: then a
test is missing, or cannot fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    """A text that occurs once in a file, what stands for it in the fault, and the tests."""

    file: str
    old: str
    new: str
    tests: str  # arguments of pytest, from the folder of the tests


NUMPY = "test_numpy.py -k every_setting"
RULES = "test_rules.py -k numpy"
OPTAX = "test_optax.py -k updates_are"
DROP_IN = "test_torch_optim.py -k the_same_numbers"
MACHINE_CODE = "test_triton.py -k machine_code"
INTERPRETED = "test_triton.py -k every_pass"
CAPTURED = "test_cuda.py -k capture"
OLDER = "test_contrib_keras.py test_optimizer_v2.py -k numbers"

FAULTS = [
    # --- the arithmetic
    Fault("rule.py", "m + (g - m) * weight_1", "m + (g + m) * weight_1", NUMPY),
    Fault("rule.py", "v + (squared - v) * weight_2", "v + (g - v) * weight_2", NUMPY),
    Fault(
        "rule.py", "g + (m - g) * weight_1 if", "m + (g - m) * weight_1 if", "test_short_betas.py"
    ),
    Fault(
        "rule.py",
        "squared + (v - squared) * weight_2 if",
        "v + (squared - v) * weight_2 if",
        "test_short_betas.py",
    ),
    Fault("rule.py", "maximum(slots[2], v) if amsgrad else v", "v", NUMPY),
    Fault(
        "rule.py",
        "return w - divide(alpha * step, root + epsilon), slots\n",
        "return w - divide(alpha * step, root), slots\n",
        NUMPY,
    ),
    Fault("rule.py", "step = m * ahead + g * fresh if", "step = m * ahead if", OPTAX),
    # --- the kernels for GPUs
    Fault(
        "kernels/triton.py",
        "return tl.div_rn(a, b)",
        "return a / b",
        MACHINE_CODE,
    ),
    Fault("kernels/triton.py", "return tl.sqrt_rn(x)", "return tl.sqrt(x)", MACHINE_CODE),
    Fault("kernels/triton.py", '"enable_fp_fusion": False', '"num_stages": 1', MACHINE_CODE),
    Fault("kernels/triton.py", "tl.multiple_of(n & -VECTOR, VECTOR)", "n", MACHINE_CODE),
    Fault(
        "kernels/triton.py",
        "        p = tl.multiple_of(p, 16)\n",
        "        p = p\n",
        MACHINE_CODE,
    ),
    Fault("kernels/triton.py", "0x7FFF + ((bits", "0x8000 + ((bits", INTERPRETED),
    Fault("kernels/triton.py", "        if whole < n:", "        if n < 0:", INTERPRETED),
    Fault(
        "kernels/triton.py",
        "if tl.load(told) != 0:",
        "if tl.load(told) > 1e9:",
        "test_triton.py -k skips",
    ),
    Fault(
        "kernels/triton.py",
        "while s < _word(firsts, p + 1):",
        "while s < _word(firsts, p):",
        "test_triton.py -k sums",
    ),
    Fault(
        "kernels/triton.py", "tl.float64))) == 0:", "tl.float64))) < 9:", "test_cuda.py -k skips"
    ),
    Fault("kernels/triton.py", "    if scale != 0:", "    if scale < 0:", "test_cuda.py -k scaler"),
    Fault("backends/gpu.py", "and event.query()", "", "test_cuda.py -k pinned"),
    Fault("backends/gpu.py", "spare = self.spares.pop()", "spare = self.spares[-1]", CAPTURED),
    Fault(
        "torch.py",
        "return self.is_clocked and not (gradients.odd or gradients.located.odd_rest)",
        "return self.is_clocked",
        "test_cuda.py -k scaler",
    ),
    Fault(
        "torch.py",
        "if not fast.is_enabled() and not self.is_clocked:",
        "if not fast.is_enabled():",
        "test_cuda.py -k fast",
    ),
    Fault("torch.py", "is_count and step.device == device", "is_count", "test_cuda.py -k where_a"),
    Fault(
        "torch.py", "counted = () if clock", "counted = () if True or clock", "test_cuda.py -k come"
    ),
    Fault(
        "torch.py", "        count = -1.0\n", "        count = 0.0\n", "test_cuda.py -k begins_anew"
    ),
    Fault(
        "torch.py", "and self._can_do_without_clock()", "and False", "test_cuda.py -k host_decides"
    ),
    Fault(
        "backends/gpu.py", "            self._kernels[key] = found\n", "", "test_cuda.py -k fails"
    ),
    Fault(
        "backends/gpu.py",
        "        if found is None and self.gpu.is_capturing():\n",
        "        if found is None and key in self.captured:\n",
        CAPTURED,
    ),
    Fault(
        "backends/gpu.py", "if stream not in self._streams:", "if False:", "test_cuda.py -k stream"
    ),
    Fault("backends/gpu.py", "return self._seen() ==", "return [] !=", "test_cuda.py -k changed"),
    Fault("backends/gpu.py", "a.tobytes() == b.tobytes()", "a.size", "test_cuda.py -k is_tried"),
    Fault(
        "backends/gpu.py", "                self._load(kernel)\n", "", "test_triton.py -k handed"
    ),
    Fault(
        "torch.py",
        "left if is_double else 1.0 - single(left)",
        "left",
        "test_torch_optim.py -k decay_is_rounded",
    ),
    Fault(
        "torch.py", "key = *key, gpu.gpu_of(entry.variable)", "pass", "test_cuda.py -k two_devices"
    ),
    Fault(
        "rule.py",
        "root = sqrt(largest + under_root) if rooted",
        "root = sqrt(largest) + under_root if rooted",
        OPTAX,
    ),
    Fault(
        "rule.py",
        "correction_1 = -functions.expm1(t * log_1)\n    correction_2 = f",
        "correction_1 = 1.0\n    correction_2 = f",
        NUMPY,
    ),
    Fault(
        "rule.py",
        "functions.sqrt(-functions.expm1(t * log_2))",
        "functions.sqrt(-functions.expm1((t + 1) * log_2))",
        NUMPY,
    ),
    Fault("rule.py", "epsilon if epsilon_hat else epsilon * correction_2", "epsilon", DROP_IN),
    Fault("adam.py", "*numbers, self.epsilon_hat", "*numbers, True", "test_epsilon_hat.py"),
    Fault("rule.py", "beta if short else 1 - beta", "1 - beta", "test_short_betas.py"),
    Fault("rule.py", "rate / (1.0 + decay * (t - 1))", "rate / (1.0 + decay * t)", OLDER),
    Fault("rule.py", "g = divide(g, scale)", "g = divide(g, scale * scale)", NUMPY),
    Fault("rule.py", "g = divide(g + accumulator, steps)", "g = divide(accumulator, steps)", NUMPY),
    Fault(
        "rule.py",
        "accumulator = zero  # cleared",
        "accumulator = accumulator * zero  # cleared",
        "test_numpy.py test_identities.py test_kernels.py -k 'nan or accumul or non_finite'",
    ),
    Fault(
        "rule.py",
        "average = momentum * average + fresh * w",
        "average = momentum * average + w",
        NUMPY,
    ),
    Fault("rule.py", "w = rounded(where(overwrite, average, w))", "w = average", NUMPY),
    Fault(
        "rule.py",
        "functions.maximum(norm / threshold, 1.0)",
        "functions.maximum(norm / threshold, 0.5)",
        NUMPY,
    ),
    Fault("rule.py", " + (norm - norm)", "", "test_kernels.py test_reference.py -k 'inf or nan'"),
    Fault(
        "rule.py",
        "functions.where(norm >= threshold, norm / threshold, 1.0)",
        "functions.maximum(norm / threshold, 1.0)",
        "test_contrib_keras.py",
    ),
    # --- the order
    Fault(
        "rule.py",
        "                if by_factor:\n                    g = g * factor\n                if by_value:\n"
        "                    g = minimum(maximum(g, -clipvalue), clipvalue)\n                if negated",
        "                if by_value:\n                    g = minimum(maximum(g, -clipvalue), clipvalue)\n"
        "                if by_factor:\n                    g = g * factor\n                if negated",
        "test_contrib_keras.py test_optimizer_v2.py -k clip",
    ),
    Fault(
        "rule.py",
        "                if negated:\n                    g = -g\n                if penalised:\n"
        "                    g = g + w * decay\n",
        "                if penalised:\n                    g = g + w * decay\n"
        "                if negated:\n                    g = -g\n",
        DROP_IN,
    ),
    Fault(
        "rule.py",
        "                if decayed:\n                    w = w - w * decay\n"
        "                w, slots = update(w, g, slots, rule_coefficients)\n",
        "                w, slots = update(w, g, slots, rule_coefficients)\n"
        "                if decayed:\n                    w = w - w * decay\n",
        NUMPY,
    ),
    Fault(
        "step.py",
        "functions.where(steps < 1, 0.0, settings.momentum)",
        "settings.momentum",
        NUMPY,
    ),
    Fault("step.py", "(updates + 1) % overwrite_every < 1", "updates % overwrite_every < 1", NUMPY),
    Fault("step.py", "(calls + 1) % n < 1", "calls % n < 1", NUMPY),
    Fault("step.py", "updates = calls // n if n else calls", "updates = calls", NUMPY),
    Fault("step.py", "t = (updates + 1) / 1", "t = (calls + 1) / 1", NUMPY),
    Fault(
        "step.py",
        "settings.weight_decay * rate if kind.decayed",
        "settings.weight_decay if kind.decayed",
        NUMPY,
    ),
    Fault(
        "step.py",
        "factor = self.factor if self.joint else clip_factor",
        "factor = clip_factor",
        "test_kernels.py test_bad_input.py test_reference.py test_contrib_keras.py -k 'inf or nan or clip'",
    ),
    Fault("step.py", "accumulated=step.accumulated,\n        clipped", "clipped", NUMPY),
    Fault(
        "step.py",
        "            if n:\n                backend.clear(selection, gradients)\n",
        "",
        "test_numpy.py test_identities.py test_state.py -k 'missing or accumul'",
    ),
    Fault(
        "step.py",
        "if passes.step.averaged and selection.rest:",
        "if False:",
        "test_numpy.py -k missing",
    ),
    Fault(
        "step.py",
        "if len(coefficients) != len(rule.coefficients):",
        "if False:",
        "test_rules.py -k too_few",
    ),
    Fault("settings.py", "decayed=self.weight_decay is not None", "decayed=False", NUMPY),
    Fault("settings.py", "NormClip(clips.norm is None,", "NormClip(True,", NUMPY),
    Fault("settings.py", "1.0 - self.ema_momentum,", "self.ema_momentum,", NUMPY),
    Fault("torch.py", "functions, rate, t + 1.0, host[4]", "functions, rate, t, host[4]", DROP_IN),
    Fault(
        "torch.py", "penalised=decay != 0.0 and not decoupled", "penalised=decay != 0.0", DROP_IN
    ),
    Fault("torch.py", 'negated=bool(group["maximize"])', "negated=False", DROP_IN),
    # --- memory and kernels
    Fault(
        "kernels/cpu.py",
        "if a > b or a != a else b))",
        "if a > b else b))",
        "test_kernels.py -k nan",
    ),
    Fault(
        "kernels/cpu.py",
        "bits + (half + ((bits >> uint32(16)) & one))",
        "bits + half",
        "test_kernels.py -k half",
    ),
    Fault(
        "kernels/cpu.py",
        "return quiet if x != x else kept",
        "return kept",
        "test_kernels.py -k half",
    ),
    Fault(
        "kernels/cpu.py",
        "np.minimum(CHUNK, every[tensors] - chunks[:, 1])",
        "np.minimum(CHUNK, every[tensors] - chunks[:, 1] - (every[tensors] > CHUNK))",
        NUMPY,
    ),
    Fault(
        "kernels/cpu.py",
        "chunks[:, 3] = ~is_used[run]",
        "chunks[:, 3] = 0",
        "test_identities.py -k sparse",
    ),
    Fault(
        "kernels/cpu.py",
        "sum(partials[start * measured + k :",
        "sum(partials[k :",
        "test_numpy.py -k 'every_setting and clipnorm'",
    ),
    Fault(
        "kernels/layout.py",
        "stored[0], stored[-1] = kind.stores_variable, False",
        "stored[0], stored[-1] = False, False",
        "test_identities.py -k layout",
    ),
    Fault(
        "kernels/layout.py",
        "if stride < reach:",
        "if stride < 0:",
        "test_bad_input.py -k test_variable",
    ),
    Fault(
        "kernels/rows.py",
        "double(2.0 ** -(_PRECISION[dtype] + 2))",
        "double(2.0 ** -(_PRECISION[dtype] - 3))",
        "test_table.py",
    ),
    Fault(
        "kernels/rows.py", "is_moving = steady\n", "is_moving = True\n", "test_table.py -k early"
    ),
    Fault(
        "kernels/rows.py",
        "new[_LARGEST] = max(new[_LARGEST], alpha)",
        "new[_LARGEST] = alpha",
        "test_table.py -k rates_that_rise",
    ),
    Fault(
        "kernels/rows.py", " and epsilon > 1e-37", "", "test_table.py -k 'same_bits and epsilon'"
    ),
    Fault(
        "kernels/rows.py",
        "may_rest = not (kind.decayed or kind.penalised)",
        "may_rest = True",
        "test_table.py -k 'same_bits and weight_decay'",
    ),
    Fault(
        "kernels/rows.py",
        "bool(np.isfinite(noted).all()) and",
        "",
        "test_table.py -k early",
    ),
    Fault("table.py", "self._clock.is_fresh = False", "pass", "test_table.py -k whatever"),
    Fault(
        "backends/deferred.py",
        "                each.flush()",
        "                pass",
        "test_embedding.py",
    ),
    Fault(
        "embedding.py",
        """_catch_up(self.weight, input)
        with OUTSIDE():
            return functional.embedding(
""",
        """with OUTSIDE():
            return functional.embedding(
""",
        "test_embedding.py -k back_by_a_forward",
    ),
    Fault(
        "kernels/jit.py",
        "for part in (*_environment(), specialisation,",
        "for part in (*_environment(),",
        "test_kernels.py -k specialisation",
    ),
    Fault(
        "backends/host.py",
        "i > 0 and spans[i - 1][1] > low",
        "False",
        "test_identities.py test_bad_input.py -k 'memory_that_the_step or shares_memory'",
    ),
    # --- recognising
    Fault(
        "fast/ndarrays.py",
        "if word(w + _DATA) != e[_ADDRESS] or not is_expected(g,",
        "if not is_expected(g,",
        "test_kernels.py test_memory.py",
    ),
    Fault(
        "fast/ndarrays.py",
        "if word(dimensions + 8 * d) != e[6 + d]:",
        "if False:",
        "test_kernels.py test_memory.py",
    ),
    Fault(
        "fast/ndarrays.py",
        "if low > 0 and stops[low - 1] > start and stop > start:",
        "if False:",
        "test_kernels.py test_identities.py",
    ),
    Fault(
        "fast/ndarrays.py",
        "for i in range(n, n + others):",
        "for i in range(n, n):",
        "test_kernels.py test_memory.py",
    ),
    Fault(
        "fast/torch.py",
        "list(map(Tensor.data_ptr, every)) == self._places",
        "True",
        "test_memory.py test_torch.py test_torch_optim.py",
    ),
    Fault(
        "fast/torch.py",
        "not all(map(is_, variables, own)):\n            return None",
        "False:\n            return None",
        "test_torch.py",
    ),
    Fault(
        "fast/torch.py",
        "overlaps = i >= 0 and self._stops[i] > address",
        "overlaps = False",
        "test_torch.py -k overlaps",
    ),
    Fault(
        "torch.py",
        "and list(map(np.ndarray.item, self._counts)) == self._ts",
        "",
        "test_torch_optim.py",
    ),
    Fault(
        "settings.py",
        "if latest is None or latest[0] != hyperparameters:",
        "if latest is None:",
        "test_numpy.py test_state.py test_short_betas.py test_rules.py -k 'callable or cross or change'",
    ),
    Fault(
        "settings.py",
        "self._latest = None\n        self._note",
        "self._note",
        "test_numpy.py -k 'changed'",
    ),
    Fault(
        "kernels/cpu.py",
        "_ELEMENTWISE = frozenset[str]()",
        '_ELEMENTWISE = frozenset({"contract"})',
        "test_kernels.py -k 'same_bits and float64 or no_flag'",
    ),
    Fault(
        "fast/openmp.py",
        "self._is_useless = not 1 <= counted[0] <= 2",
        "self._is_useless = False",
        "test_torch.py -k runtime_of_another",
    ),
    Fault(
        "fast/openmp.py",
        "os.register_at_fork(after_in_child=found.give_up)",
        "pass",
        "test_torch.py -k a_fork_after_torchs",
    ),
    Fault(
        "fast/tensorflow.py",
        "        if self._backend.how == _WITHIN:\n            raise NotOurs",
        "        return",
        "test_tensorflow.py -k where_xla_cannot",
    ),
    Fault(
        "fast/tensorflow.py",
        "        with tf.control_dependencies(gradients):\n            if len",
        "        if True:\n            if len",
        "test_tensorflow.py -k index_out_of_range",
    ),
    Fault(
        "compat/tensorflow.py",
        "return tf.cast(value, dtype)  # by way of float32",
        "return tf.constant(value, dtype)",
        "test_optimizer_v2.py -k 'bits_of_the_original and float64'",
    ),
    # --- files of PyTorch and optax
    # --- files of state
    Fault(
        "saving/file.py",
        "if _state_hash(tensors, found, beside) != state_hash or",
        "if",
        "test_saved_files.py -k altered",
    ),
    Fault(
        "saving/file.py",
        "if header_digest != opened.header_digest:",
        "if False:",
        "test_saved_files.py -k altered",
    ),
    Fault(
        "saving/file.py",
        "if self._now() != self._then:",
        "if False:",
        "test_saving.py -k written_to",
    ),
    Fault(
        "saving/atomic.py",
        "                partial.unlink(missing_ok=True)\n",
        "                pass\n",
        "test_saved_files.py -k 'full_disk or interrupt'",
    ),
    Fault(
        "saving/atomic.py",
        'partial = path.with_name(f".{path.name}.partial")',
        "partial = path",
        "test_saved_files.py -k killed",
    ),
    Fault(
        "saving/matching.py",
        'at = f"extension.{counts[number]}"',
        'at = f"extension.{number}"',
        "test_saving.py -k extensions_are_told",
    ),
    Fault(
        "saving/matching.py",
        "yield found.pop(variable.name, None), variable",
        "yield found.pop(next(iter(found), variable.name), None), variable",
        "test_saving.py -k another_order",
    ),
    Fault(
        "saving/matching.py", "    if wrong:\n", "    if not wrong:\n", "test_saving.py -k decide"
    ),
    Fault(
        "saving/engine.py",
        "check_in_hand(is_given_away or not backend.keeps_state)",
        "check_in_hand(not backend.keeps_state)",
        "test_saving.py -k users_hands",
    ),
    Fault(
        "saving/engine.py",
        "now = {n: getattr(engine, n) for n in matching.STRUCTURE if hasattr(engine, n)}",
        "now = {}",
        "test_saving.py -k between_load_and_build",
    ),
    Fault(
        "saving/torch.py",
        "            snapshot = _named_alike(snapshot, names)\n",
        "            pass\n",
        "test_saving_torch.py -k names_and_not",
    ),
    Fault(
        "saving/torch.py",
        "            if isinstance(p, Rows):\n                p.flush()",
        "            pass",
        "test_saving_torch.py -k behind",
    ),
    Fault(
        "saving/torch.py",
        "is_whole = partner is not None and len(slots) == len(partner.slots)",
        "is_whole = partner is not None",
        "test_saving_torch.py -k what_fits",
    ),
    Fault(
        "saving/torch.py",
        "        return torch.full_like(own, value)",
        "        return value",
        "test_saving_torch.py -k 'stopped and tensor'",
    ),
    Fault(
        "saving/torch.py",
        "if int(step.fill_(count)) != count:",
        "if False and step.fill_(count):",
        "test_saving_torch.py -k counts",
    ),
    Fault(
        "saving/trees.py",
        "    if not leaf.weak_type:",
        "    if True:",
        "test_saving_torch.py -k every_kind",
    ),
    Fault(
        "saving/trees.py",
        "place = leaf.sharding if is_committed else None",
        "place = None",
        "test_saving_torch.py -k lies_where",
    ),
    Fault(
        "saving/trees.py",
        "            value = leaf.copy()",
        "            pass",
        "test_saving_torch.py -k lies_where",
    ),
    Fault(
        "saving/translate.py",
        '"epsilon_hat": bool(group.get("epsilon_hat")),',
        "",
        "test_formats_torch.py -k 'torch_goes_on or both_sides'",
    ),
    Fault(
        "saving/translate.py",
        '"epsilon_hat": settings.get("epsilon_hat", True),',
        "",
        "test_formats_torch.py -k 'both_sides or no_equivalent'",
    ),
    Fault(
        "formats/torch.py",
        '        check_archive(path, path.open("rb"))',
        "        pass",
        "test_formats_torch.py -k no_altered",
    ),
    Fault(
        "formats/dcp.py",
        "            check_archive(self.path, _Part(file, begin, length))",
        "            pass",
        "test_formats_torch.py -k damaged",
    ),
    Fault(
        "formats/dcp.py",
        "torch.load(value, weights_only=True)",
        "torch.load(value, weights_only=False)",
        "test_formats_torch.py -k runs_no_code",
    ),
    Fault(
        "formats/orbax.py",
        "            pairs |= {} if same is None else {leaf.name: same}",
        "            pass",
        "test_formats_torch.py -k optax_goes_on",
    ),
    # --- state
    Fault(
        "state.py",
        'self.named.insert(1, ("learning_rate", self.rate))',
        'self.named.append(("learning_rate", self.rate))',
        "test_state.py",
    ),
    Fault(
        "state.py",
        "low = 0 if variable is self.iteration else low",
        "low = low",
        "test_state.py test_bad_input.py",
    ),
    Fault("state.py", "saved.setdefault(name, np.array(value))", "pass", "test_state.py"),
    Fault(
        "state.py",
        "if len(given) == len(restored.variables) and given[i] == (name, shape, dtype):",
        "if len(given) == len(restored.variables):",
        "test_state.py test_bad_input.py",
    ),
    Fault("engine.py", "or entry.name in self._excluded_exact", "", "test_state.py"),
    Fault(
        "engine.py",
        "for group in (slots[:2], slots[2:])",
        "for group in (slots,)",
        "test_state.py",
    ),
    Fault(
        "torch.py",
        "if missing and any(key in held",
        "if False and any(key in held",
        "test_torch_optim.py -k 'state or checkpoint or missing or complete'",
    ),
    Fault(
        "torch.py",
        "for stripped in (list, _unwrapped, _bare):",
        "for stripped in (_bare,):",
        "test_torch_optim.py -k name",
    ),
    Fault(
        "backends/base.py",
        "return self._basis.steps not in (None, self.steps)",
        "return False",
        "test_threads.py",
    ),
    Fault(
        "backends/host.py",
        "if calls != work.steps:\n                if not work.is_begun:\n                    return None\n",
        "if calls != work.steps:\n",
        "test_threads.py test_whole_steps.py",
    ),
    # --- what is said of slow paths, and the command ---
    Fault(
        "slow.py",
        "    if reason in reasons:\n",
        "    if False:\n",
        "test_kernels.py -k cannot_be_written",
    ),
    Fault(
        "kernels/cpu.py",
        "        slow.warn(\n",
        "        str(\n",
        "test_kernels.py -k without_numba",
    ),
    Fault(
        "cli/train.py",
        "            if not is_shown:\n",
        "            if False:\n",
        "test_cli.py -k a_line_an_epoch",
    ),
    Fault(
        "cli/peers.py",
        'adam["weight_decay"] is None',
        "True",
        "test_cli.py -k own_adam",
    ),
]


def found(fault: Fault, folder: Path) -> bool:
    """Whether a test fails where the fault is planted."""
    path = folder / "src" / "omniadam" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {fault.old!r} {text.count(fault.old)} times")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(folder / "src")}
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {fault.tests}"
    try:
        done = subprocess.run(
            command, shell=True, cwd=folder / "tests", env=env, capture_output=True, text=True
        )
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):  # no test was run
        raise ValueError(f"{command}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.returncode != 0


def main(words: Sequence[str]) -> int:
    chosen = [f for f in FAULTS if not words or any(w in f.file or w in f.old for w in words)]
    missed = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        for each in ("src", "tests", "docs", "examples", "pyproject.toml", "README.md"):
            source = ROOT / each
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / each)
        for i, fault in enumerate(chosen, 1):
            begun = time.monotonic()
            is_found = found(fault, folder)
            seconds = time.monotonic() - begun
            line = (
                fault.new.strip().splitlines()[0] if fault.new.strip() else f"without {fault.old}"
            )
            mark = "found" if is_found else "NOT FOUND"
            print(
                f"{i:3}/{len(chosen)} {mark:9} {seconds:5.1f} s  {fault.file}: {line}", flush=True
            )
            missed += [] if is_found else [fault]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults found")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
