"""Files of Keras, tf_keras, TensorFlow: keras_files.py, in a process with Keras on TensorFlow."""

from __future__ import annotations

from pathlib import Path

import pytest

from inner import by_backend

HERE = Path(__file__).parent
NAMES = [
    *(
        f"test_read_and_continued[{name}]"
        for name in (
            "keras",
            "keras, every slot",
            "keras, schedule",
            "keras, loss scale",
            "omniadam.keras",
            "tf_keras",
            "tf_keras, loss scale",
            "tf_keras, legacy",
        )
    ),
    *(
        f"test_written_into_and_continued[{name}]"
        for name in (
            "keras",
            "keras, every slot",
            "keras, loss scale",
            "omniadam.keras",
            "tf_keras",
            "tf_keras, legacy",
        )
    ),
    *(
        f"test_altered_bytes[{name}]"
        for name in (
            "keras.keras",
            "keras.weights.h5",
            "tf_keras.h5",
            "keras.h5",
        )
    ),
    "test_a_checkpoint_has_the_new_files_when_its_index_is_renamed",
    "test_a_checkpoint_that_cannot_be_replaced_is_as_it_was",
    "test_altered_checkpoints",
    "test_cut_off_anywhere",
    "test_every_version_of_hdf5",
    "test_files_of_keras_need_no_library",
    "test_hostile_archives",
    "test_hostile_checkpoints",
    "test_hostile_hdf5",
    "test_variables_that_were_added_later",
    "test_what_a_file_of_weights_does_not_tell",
    "test_what_does_not_fit_is_refused_and_changes_nothing",
]
check = by_backend("keras_files.py", TF_CPP_MIN_LOG_LEVEL="3")


@pytest.mark.needs("h5py", "keras", "tensorflow", "tf_keras")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["tensorflow"])
def test_keras_files(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    check(request)


def test_no_test_is_left_out() -> None:
    """That the names above are those of all tests there, which this process cannot import."""
    listed = {name.partition("[")[0] for name in NAMES}
    source = (HERE / "keras_files.py").read_text()
    assert listed == {
        line[4:].partition("(")[0] for line in source.splitlines() if line.startswith("def test_")
    }
