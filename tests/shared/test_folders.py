import os

import pytest

from dpnp_shared.folders import staged_folder


def test_all_or_nothing(tmp_path):
    target = tmp_path / "new" / "out"
    with staged_folder(target) as folder:
        (folder / "a").write_text("first")
        assert not target.exists()
    assert os.listdir(target) == ["a"]
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as folder:  # noqa: PT012
        (folder / "b").write_text("half")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "first"
    with staged_folder(target) as folder:
        (folder / "c").write_text("second")
    assert os.listdir(target) == ["c"]
    assert os.listdir(tmp_path / "new") == ["out"]
