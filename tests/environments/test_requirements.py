"""isohub.environments.requirements and the readers of files: what is asked for, honoured, refused and said."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.environments.declared import Declared
from isohub.environments.dependencies import parse_dependencies
from isohub.environments.environment import Environment
from isohub.environments.prepare import prepare
from isohub.environments.requirements import declared_by
from isohub.environments.requirements_file import read_requirements_file
from isohub.errors import EnvironmentBuildError
from isohub.repos.naming import has_hidden
from isohub.repos.outline import read_outline


def repo(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def asked(root: Path, environment: Environment | None = None, hubconf: str = "") -> Declared:
    (root / "hubconf.py").write_text(hubconf)
    return declared_by(environment or Environment("auto"), root, read_outline(root), {})


def texts(declared: Declared) -> list[str]:
    return [each.text for each in declared.asked]


def read(tmp_path: Path, text: str, *, own: bool = False) -> Declared:
    file = tmp_path / "requirements.txt"
    file.write_text(text)
    return read_requirements_file(file, None if own else tmp_path)[0]


def test_lines_of_a_requirements_file(tmp_path: Path):
    declared = read(
        tmp_path,
        "\ufeff# a comment\ntimm==0.6.13  # pinned\nnumpy >=1.0, \\\n  <3\n\nscipy[extra]>1; python_version >= '3.8'\n"
        f"einops==0.6 --hash=sha256:{'A' * 64} \\\n    --hash=sha256:{'b' * 64}\n",
    )
    assert texts(declared) == [
        "timm==0.6.13",
        "numpy<3,>=1.0",
        'scipy[extra]>1; python_version >= "3.8"',
        "einops==0.6",
    ]
    assert declared.asked[3].hashes == ("a" * 64, "b" * 64)
    assert declared.asked[0].where == "requirements.txt:2"


def test_includes_and_constraints(tmp_path: Path):
    repo(tmp_path, **{"more/base.txt": "einops\n-r ../requirements.txt\n", "more/pins.txt": "einops==0.6\n"})
    declared = read(tmp_path, "-r more/base.txt\n--constraint=more/pins.txt\ntimm\n")
    assert texts(declared) == ["einops", "timm"]
    assert [each.text for each in declared.constraints] == ["einops==0.6"]


@pytest.mark.parametrize("line", ["-r ../outside.txt", "-r link.txt", "--requirement /etc/passwd", "-c ../outside.txt"])
def test_nothing_outside_of_the_checkout_is_read(tmp_path: Path, line: str):
    (tmp_path / "outside.txt").write_text("secret-package\n")
    root = tmp_path / "repo"
    root.mkdir()
    (root / "link.txt").symlink_to("../outside.txt")
    with pytest.raises(EnvironmentBuildError, match="leads out of the checkout") as caught:
        read(root, line)
    assert "secret-package" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path):
    with pytest.raises(EnvironmentBuildError, match="is not there"):
        read(tmp_path, "-r nothing.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(EnvironmentBuildError, match="no regular file"):
        read(tmp_path, "-r pipe.txt")
    with pytest.raises(EnvironmentBuildError, match="larger than"):
        read(tmp_path, "a\n" * 200_000)
    with pytest.raises(EnvironmentBuildError, match="more than 2000"):
        read(tmp_path, "a\n" * 3_000)
    (tmp_path / "requirements.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(EnvironmentBuildError, match="not UTF-8"):
        read_requirements_file(tmp_path / "requirements.txt", tmp_path)
    for number in range(30):
        (tmp_path / f"r{number}.txt").write_text(f"-r r{number + 1}.txt\n")
    with pytest.raises(EnvironmentBuildError, match="deep"):
        read(tmp_path, "-r r0.txt")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("timm @ https://example.org/timm.whl", "timm"),
        ("git+https://me:s3cret@example.org/x.git#egg=thing", "thing"),
        ("https://example.org/x.whl", None),
        ("-e git+ssh://git@example.org/x.git#egg=thing", "thing"),
        ("./vendored", None),
        ("file:///etc/passwd", None),
        ("x.whl", None),
        ("-r https://example.org/more.txt", None),
        ("\x1b[2J", None),
    ],
)
def test_addresses_and_paths_are_not_taken(tmp_path: Path, line: str, name: str | None):
    declared = read(tmp_path, line + "\n")
    assert texts(declared) == []
    (unusable,) = declared.unusable
    assert unusable.name == name
    assert "s3cret" not in unusable.text
    assert "\x1b" not in unusable.text


def test_no_escape_sequence_hides_in_a_version(tmp_path: Path):
    declared = read(tmp_path, "torch===\x1b[2J\nnumpy===1\u202e\n")
    assert texts(declared) == []
    assert [each.name for each in declared.unusable] == ["torch", "numpy"]
    assert not any(has_hidden(each.text) for each in declared.unusable)
    repo(tmp_path, pyproject__toml='[project]\nname="x"\ndependencies = ["torch===\\u001b[2J"]\n')
    (tmp_path / "requirements.txt").unlink()
    assert texts(asked(tmp_path, hubconf="dependencies = ['numpy===\\x1b[2J']")) == []


def test_indexes_are_the_caller_s_to_choose(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3cret")
    text = "--index-url https://example.org/${MY_SECRET}\n--extra-index-url=https://b.example\n-f links\n--pre\ntimm\n"
    of_repo = read(tmp_path, text)
    assert texts(of_repo) == ["timm"]
    assert of_repo.indexes.default is None
    assert len(of_repo.remarks) == 3
    assert "s3cret" not in "".join(of_repo.remarks)
    own = read(tmp_path, text, own=True).indexes
    assert own.default == "https://example.org/s3cret"
    assert own.extra == ("https://b.example",)
    assert own.find_links == (str(tmp_path / "links"),)
    assert own.prereleases is True


def test_a_caller_s_own_mistake_is_an_error(tmp_path: Path):
    with pytest.raises(EnvironmentBuildError, match="is no requirement"):
        read(tmp_path, "two words\n", own=True)
    with pytest.raises(EnvironmentBuildError, match="not understood"):
        read(tmp_path, "--no-such-option\n", own=True)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str):
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        try:
            declared = read(Path(place), text.encode("utf-8", "replace").decode())
        except EnvironmentBuildError:
            return
    assert not any("\n" in each.text for each in declared.asked)
    assert not any(has_hidden(each.text + each.where) for each in declared.unusable)


def test_which_file_counts(tmp_path: Path):
    project = (
        '[project]\nname = "x"\ndependencies = ["fromproject>=1"]\n[project.optional-dependencies]\nVision = ["seen"]\n'
    )
    repo(tmp_path, pyproject__toml=project, setup__cfg="[options]\ninstall_requires =\n  fromcfg\n")
    assert texts(asked(tmp_path)) == ["fromproject>=1"]
    assert texts(asked(tmp_path, Environment("auto", extras=["vision"]))) == ["fromproject>=1", "seen"]
    assert "no extra audio; it has Vision" in asked(tmp_path, Environment("auto", extras=["audio"])).remarks[0]
    repo(tmp_path, requirements__txt="fromfile\n")
    assert texts(asked(tmp_path)) == ["fromfile"]
    repo(tmp_path, requirements__txt="fromfile\n-e .[vision]\n")
    assert texts(asked(tmp_path)) == ["fromfile", "fromproject>=1", "seen"]
    assert texts(asked(tmp_path, Environment("auto", requirements=["mine"]))) == ["mine"]


def test_hubconf_s_dependencies_count_too(tmp_path: Path):
    repo(tmp_path, requirements__txt="opencv-python-headless==4.5\ntimm==0.6.13\n")
    declared = asked(tmp_path, hubconf="dependencies = ['torch', 'cv2', 'timm', 'yaml', 'os', 'numpy>=1.0']\n")
    assert texts(declared) == ["opencv-python-headless==4.5", "timm==0.6.13", "torch", "PyYAML", "numpy>=1.0"]
    assert [each.import_name for each in declared.asked] == [None, None, "torch", "yaml", None]
    declared = asked(tmp_path, hubconf="dependencies = compute()\n")
    assert "computes some of its dependencies" in declared.remarks[0]
    markers = declared_by(
        Environment("auto"),
        tmp_path,
        read_outline(repo(tmp_path, hubconf__py="dependencies = ['old; python_version<\"3\"']")),
        {},
    )
    assert "old" not in texts(markers)


def test_setup_cfg(tmp_path: Path):
    repo(
        tmp_path,
        setup__cfg="[options]\npython_requires = >=3.6\ninstall_requires =\n    timm>=0.4  # why\n    # no\n"
        "    old; python_version < '3'\n[options.extras_require]\nvision = seen; two\n",
    )
    declared = asked(tmp_path, Environment("auto", extras=["vision"]))
    assert texts(declared) == ["timm>=0.4", 'old; python_version < "3"', "seen", "two"]
    assert declared.requires_python == ">=3.6"
    repo(tmp_path, setup__cfg="[options]\ninstall_requires = file: needs.txt\n", needs__txt="einops\n")
    assert texts(asked(tmp_path)) == ["einops"]
    repo(tmp_path, setup__cfg="no section\n")
    with pytest.raises(EnvironmentBuildError, match=r"setup.cfg cannot be read"):
        asked(tmp_path)


def test_pyproject_of_other_kinds(tmp_path: Path):
    poetry = (
        '[tool.poetry.dependencies]\npython = "^3.8"\ntimm = "^0.6.13"\neinops = "~0.4"\nscipy = ">=1,<2"\nany = "*"\n'
        'exact = "1.2"\nextra = { version = "^2", extras = ["a"], markers = "sys_platform == \'linux\'" }\n'
        'opt = { version = "1", optional = true }\nlocal = { path = "../x" }\nzero = "^0.0.3"\n'
    )
    declared = asked(repo(tmp_path, pyproject__toml=poetry))
    assert texts(declared) == [
        "timm<0.7,>=0.6.13",
        "einops<0.5,>=0.4",
        "scipy<2,>=1",
        "any",
        "exact==1.2",
        'extra[a]<3,>=2; sys_platform == "linux"',
        "zero<0.0.4,>=0.0.3",
    ]
    assert [each.name for each in declared.unusable] == ["local"]
    dynamic = '[project]\nname = "x"\ndynamic = ["dependencies"]\n'
    declared = asked(repo(tmp_path, pyproject__toml=dynamic))
    assert "is computed when the project is built" in declared.remarks[0]
    file = dynamic + '[tool.setuptools.dynamic]\ndependencies = { file = ["needs.txt"] }\n'
    assert texts(asked(repo(tmp_path, pyproject__toml=file, needs__txt="einops\n"))) == ["einops"]


def test_hostile_pyprojects(tmp_path: Path):
    for text in ("x" + ".x" * 20_000 + " = 1\n", "a = " + "[" * 5_000, "[project]\ndependencies = 3\n", "\x00"):
        repo(tmp_path, pyproject__toml=text)
        try:
            assert texts(asked(tmp_path)) == []
        except EnvironmentBuildError as error:
            assert str(error).isprintable()
    repo(tmp_path, pyproject__toml='[project]\nname="x"\ndependencies = ["a @ https://e.org/x", "\\u001b[2J", "ok"]\n')
    declared = asked(tmp_path)
    assert texts(declared) == ["ok"]
    assert len(declared.unusable) == 2


def test_environment_yml(tmp_path: Path):
    repo(
        tmp_path,
        environment__yml="name: x\nchannels:\n  - conda-forge\ndependencies:\n  - python=3.8\n  - numpy\n  - pip:\n"
        '    - timm==0.6.13  # pinned\n    - "einops"\n  - scipy\nprefix: /x\n',
    )
    declared = asked(tmp_path)
    assert texts(declared) == ["timm==0.6.13", "einops"]
    assert "conda's packages are not installed: python=3.8, numpy, scipy" in declared.remarks[0]


def test_setup_py_is_not_run(tmp_path: Path):
    mark = tmp_path / "ran"
    declared = asked(repo(tmp_path, setup__py=f"open({str(mark)!r}, 'w')"))
    assert texts(declared) == []
    assert "setup.py is not run" in declared.remarks[0]
    assert not mark.exists()


@pytest.mark.parametrize(
    "files",
    [
        {"requirements.txt": f'a; {"(" * 1500}python_version>"3"{")" * 1500}\n'},
        {"requirements.txt": f"packaging=={'1' * 5000}\n"},
        {"requirements.txt": f'a; python_version>"{"1" * 5000}"\n'},
        {"requirements.txt": "git+https://e.org/x#egg=foo-\n"},
        {"requirements.txt": "-r foo\0bar\n"},
        {"requirements.txt": "-r .\n"},
        {"setup.cfg": "[options]\ninstall_requires = file: a\0b\n"},
        {"pyproject.toml": "[tool.poetry.dependencies]\n'foo bar' = { git = 'https://e.org/x' }\n"},
        {"pyproject.toml": f"[tool.poetry.dependencies]\nfoo = '^{'1' * 5000}'\n"},
        {"pyproject.toml": "[project]\nname = 'x'\ndependencies = [" + "'a',\n" * 2001 + "]\n"},
        {
            "hubconf.py": f"dependencies = ['a; {'(' * 190}python_version>\"3\"{')' * 190}', 'packaging=={'1' * 5000}']\n"
        },
    ],
)
def test_what_exhausts_a_parser_is_an_error_of_ours(tmp_path: Path, files: dict[str, str]):
    checkout = SimpleNamespace(path=tmp_path, pin=SimpleNamespace(name="o/r@1", extras=()), reference="o/r")
    repo(tmp_path, **{"hubconf.py": "", **files})
    outline = read_outline(tmp_path)
    if "hubconf.py" in files:  # what is no requirement there is named before it runs
        assert [each.import_name for each in parse_dependencies(outline.dependencies)] == [None, None]
        return
    with pytest.raises(EnvironmentBuildError) as caught:
        prepare(Environment("auto"), tmp_path / "store", checkout, outline, offline=True)
    assert caught.value.message.isprintable()


def test_a_project_s_python_of_thousands_of_digits_is_a_remark(tmp_path: Path):
    text = f"[project]\nname = 'x'\nrequires-python = '>={'1' * 5000}'\ndependencies = ['a']\n"
    declared = asked(repo(tmp_path, pyproject__toml=text))
    assert declared.requires_python is None
    assert "requires-python is no version" in declared.remarks[0]


def test_a_repo_s_own_modules_are_not_asked_of_an_index(tmp_path: Path):
    repo(tmp_path, **{"utils.py": "", "datasets/readme.txt": "", "models/a.py": ""})
    (tmp_path / "models" / "__init__.py").touch()
    declared = asked(tmp_path, hubconf="dependencies = ['models', 'utils', 'datasets']\n")
    assert texts(declared) == ["datasets"]
