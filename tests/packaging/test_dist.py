"""What `make dist` publishes: the same bytes in every folder, and nothing of the machine."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from common import ROOT, is_one_sentence
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

sys.path.insert(0, str(ROOT / "scripts"))

import dist

EPOCH = 1_700_000_000
NO_CUDA = [f"vllm_adamas/backends/cuda/libadamas_{name}.so is missing" for name in ("sm90", "sm80")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """An sdist and its wheel, built twice, from copies of the tree in different folders and with different times.

    Without CUDA kernels, and without optimisation, since the two builds start from nothing.
    """
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMAS_BUILD_CUDA", "0")
        patch.setenv("ADAMAS_CXX_FLAGS", "-O0")
        for name in ("first", "the-second"):
            folder = tmp_path_factory.mktemp(name)
            tree = folder / name
            shutil.copytree(ROOT, tree, ignore=unwanted, copy_function=shutil.copyfile)
            sdist = dist.make_sdist(tree, folder / "dist", EPOCH)
            made.append((sdist, dist.make_wheel(sdist, folder / "dist", EPOCH)))
    return made


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return built[0][1]


def test_two_builds_are_the_same(built) -> None:
    (sdist, wheel), (other_sdist, other_wheel) = built
    assert [sdist.name, wheel.name] == [other_sdist.name, other_wheel.name]
    assert dist.sha256(sdist) == dist.sha256(other_sdist)
    assert dist.sha256(wheel) == dist.sha256(other_wheel)


def test_the_archives_say_nothing_of_who_built_them(built) -> None:
    sdist, wheel = built[0]
    with tarfile.open(sdist) as archive:
        for member in archive:
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert member.mtime == EPOCH
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        files = [name for name in names if not name.endswith("/")]
        assert len(names) == len(set(names))
        assert all(archive.getinfo(name).date_time[:3] == (2023, 11, 14) for name in files)


def test_only_the_cuda_library_is_missing(wheel: Path) -> None:
    """Everything else that a release asks for is there, a manylinux tag among it."""
    assert dist.wheel_problems(wheel) == NO_CUDA


@pytest.mark.parametrize(
    ("member", "content", "problem"),
    [
        ("tests/test_it.py", b"", "beside the package"),
        ("vllm_adamas/tests/data.json", b"", "belongs to the tests"),
        ("vllm_adamas/extra.so", b"\0/home/somebody/src/page.h\0", "/home/somebody/src/page.h"),
        ("vllm_adamas/extra.so", b"\0/builds/adamas/csrc/page.h\0", "/builds/adamas/csrc/page.h"),
    ],
)
def test_what_does_not_belong_is_found(
    wheel: Path, tmp_path: Path, member: str, content: bytes, problem: str
) -> None:
    changed = shutil.copy(wheel, tmp_path)
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr(member, content)
    assert problem in "".join(set(dist.wheel_problems(Path(changed))) - set(NO_CUDA))


def test_paths_that_every_host_has_are_no_problem(wheel: Path, tmp_path: Path) -> None:
    """Those that the CUDA runtime reads, and those of headers, which are relative."""
    changed = shutil.copy(wheel, tmp_path)
    held = b"\0/sys/devices/system/node\0/usr/local/cuda/bin/../lib64/stubs\0tvm_ffi/include/tvm/any.h\0"
    with zipfile.ZipFile(changed, "a") as archive:
        for library in dist.LIBRARIES[1:]:
            archive.writestr(library, held)
    assert dist.wheel_problems(Path(changed)) == []


def test_a_wheel_for_this_machine_alone_is_no_release(wheel: Path, tmp_path: Path) -> None:
    plain = shutil.copy(wheel, tmp_path / "vllm_adamas-0.1.0-py3-none-linux_x86_64.whl")
    assert "manylinux" in dist.wheel_problems(Path(plain))[0]


def test_the_index_takes_the_metadata(built) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *built[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_sbom_follows_its_standard(wheel: Path) -> None:
    sbom = dist.make_sbom(wheel, EPOCH)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(sbom)) is None
    (digest,) = sbom["metadata"]["component"]["hashes"]
    assert digest["content"] == dist.sha256(wheel)
    parts = {part["name"] for part in sbom["components"]}
    assert {"apache-tvm-ffi", "torch", "pydantic", "numpy"} <= parts
    assert not [name for name in parts if name.startswith("vllm")], "an extra is not required"
    assert "cudart" not in parts


def test_a_tree_with_changes_is_not_built(tmp_path: Path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "new.py").touch()
    monkeypatch.setattr(dist, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["dist.py"])
    with pytest.raises(SystemExit) as ended:
        dist.main()
    assert is_one_sentence(ended.value.code)
    assert "changes" in ended.value.code
