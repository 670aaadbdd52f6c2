"""tools/run_stage.py: a Dockerfile is read as an engine would read it, and what it can't carry out is refused."""

import os
from pathlib import Path

import pytest

from tools import run_stage

TEXT = r"""# syntax=docker/dockerfile:1
ARG BASE=debian:12

FROM ${BASE} AS first
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG BASE
ENV A=one B="two words" C=$BASE PATH=/a/bin:$PATH
# a comment
RUN --mount=type=cache,target=/cache/a,uid=7,gid=8 --mount=type=cache,target=/cache/b \
    make a \
    # between the lines
    && make "b"
WORKDIR /opt/x

FROM first AS second
USER 7:8
WORKDIR sub
COPY --chown=u:u a/ b.txt ./
RUN true
HEALTHCHECK --interval=1m --retries=2 \
    CMD ["check", "it"]
ENTRYPOINT ["init", "--"]
CMD ["run"]
"""


@pytest.fixture
def dockerfile(tmp_path, monkeypatch):
    path = tmp_path / "Dockerfile"
    path.write_text(TEXT)
    monkeypatch.setattr(run_stage, "DOCKERFILE", path)
    return path


def test_a_stage_is_its_bases_lines_and_its_own(dockerfile):
    first, copied, second, health, command = run_stage.list_steps("second", ["other"])
    assert first.words == ("/bin/bash", "-o", "pipefail", "-c", 'make a && make "b"')
    assert (first.user, first.folder) == ("root", "/")
    assert first.environment == {
        **{"PATH": "/a/bin:" + run_stage.PATH, "BASE": "debian:12"},
        **{"A": "one", "B": "two words", "C": "debian:12"},
    }
    assert first.mounts == ("type=cache,target=/cache/a,uid=7,gid=8", "type=cache,target=/cache/b")
    assert (copied.user, copied.folder, copied.words) == ("u:u", "/opt/x/sub", ("a/", "b.txt", "./"))
    assert (second.kind, second.user, second.line) == ("RUN", "7", 19)
    assert health.words == ("check", "it")
    assert command.words == ("init", "--", "other")
    assert run_stage.list_steps("second", [])[-1].words == ("init", "--", "run")


def test_lines_are_carried_out_unchanged():
    text = (Path(__file__).parents[2] / "Dockerfile").read_text()
    _, stages = run_stage.read_stages(text)
    runs = [line.value for line in stages["cpu"].instructions if line.name == "RUN"]
    steps = [step for step in run_stage.list_steps("cpu", []) if step.kind == "RUN"]
    assert len(runs) == len(steps) == 2
    for value, step in zip(runs, steps, strict=True):
        assert value.endswith(step.words[-1])
        assert step.words[:-1] == ("/bin/bash", "-o", "pipefail", "-c")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("FROM a AS s\nADD x y\n", "line 2: ADD is not understood"),
        ("FROM a AS s\nCOPY --from=b /x /x\n", "line 2: COPY --from=b needs an engine"),
        ("FROM a AS s\nRUN <<EOF\n", "line 2: a here-document"),
        ("FROM a b c\n", "line 1: FROM a b c"),
        ("FROM a AS t\n", "stage 's' is not in the Dockerfile; it has t"),
    ],
)
def test_what_is_not_understood_is_refused(dockerfile, text, match):
    dockerfile.write_text(text)
    with pytest.raises(ValueError, match=match):
        run_stage.list_steps("s", [])


def test_copies_go_where_an_engine_puts_them():
    context = ["setup.py", "pkg/a.py", "pkg/sub/b.py", "LICENSE"]
    place = run_stage.place_copies
    assert place(["setup.py", "LICENSE", "./"], "/w", context) == {"setup.py": "/w/setup.py", "LICENSE": "/w/LICENSE"}
    assert place(["pkg/a.py", "x/"], "/w", context) == {"pkg/a.py": "/w/x/a.py"}
    assert place(["setup.py", "/etc/s"], "/w", context) == {"setup.py": "/etc/s"}
    assert place(["pkg", "q/"], "/w", context) == {"pkg/a.py": "/w/q/a.py", "pkg/sub/b.py": "/w/q/sub/b.py"}
    assert place([".", "."], "/w", context)["pkg/sub/b.py"] == "/w/pkg/sub/b.py"
    with pytest.raises(ValueError, match="COPY runs: nothing of that name"):
        place(["runs", "."], "/w", context)


def test_a_tree_is_asked_for(dockerfile, tmp_path, capsys):
    assert run_stage.main(["first", "--tree", str(tmp_path / "none")]) == 1
    assert "not a directory tree" in capsys.readouterr().err
    assert run_stage.main(["second", "--print", "--", "other"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "CMD as 7 in /opt/x/sub: init -- other"


def test_what_a_stage_needs_of_the_machine_is_named(dockerfile, tmp_path, monkeypatch, capsys):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").touch()
    assert run_stage.main(["first", "--tree", str(tmp_path), "--env", "NO_SUCH_VARIABLE"]) == 1
    assert "--env NO_SUCH_VARIABLE: is not set here" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run_stage.main(["first", "--tree", str(tmp_path)]) == 1
    assert "need root" in capsys.readouterr().err


def test_users_are_the_trees(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nfipo:x:10001:10001::/home/fipo:/bin/sh\n")
    assert run_stage.find_user(tmp_path, "fipo") == (10001, 10001, "/home/fipo")
    assert run_stage.find_user(tmp_path, "10001") == (10001, 10001, "/home/fipo")
    with pytest.raises(ValueError, match="user 'other' is not in"):
        run_stage.find_user(tmp_path, "other")


def test_folders_that_are_there_keep_their_owner(tmp_path):
    (tmp_path / "a").mkdir(mode=0o700)
    run_stage.make_owned(tmp_path, "/a/b/c", os.getuid(), os.getgid())
    assert (tmp_path / "a/b/c").is_dir()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_the_context_is_what_git_knows_and_the_rules_let_through():
    context = run_stage.list_context()
    assert {"setup.py", "tools/run_stage.py", "examples/quickstart_cpu/run.sh"} <= set(context)
    assert not [path for path in context if path.startswith(("tests/", "runs/", "docs/", "."))]
