# SPDX-License-Identifier: Apache-2.0
"""Flags of `serve`: misspelt ones are refused before vLLM is imported, sizes mean one thing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_eigen import cli
from vllm_eigen.common.errors import UsageError
from vllm_eigen.plugin.vllm_version import check_vllm_version, own_module
from vllm_eigen.server.commands import serve
from vllm_eigen.server.launch.flags import OURS, check_flags, listed, parser_flags

RELEASE = listed()[0]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--max-modle-len", "--max-model-len"),
        ("--kv-cache-memory-byte5", "--kv-cache-memory-bytes"),
        ("--open-route5=/docs", "--open-routes"),
        ("--served_model_nam3", "--served-model-name"),
    ],
)
def test_a_misspelt_flag_names_the_nearest(flag: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown flag --[\w-]+; did you mean {nearest}\?"):
        check_flags(["model", flag, "1"], RELEASE)


@pytest.mark.unit
def test_what_vllm_understands_passes() -> None:
    arguments = (
        "--max_model_len 4096 --max-model-l 10 --compilation-config.mode 3 -O3 -tp 2 --port=1 "
        "--hf-overrides {} --no-enable-prefix-caching --eigen-bases x --seed -1 --"
    )
    check_flags(arguments.split(), RELEASE)
    check_flags(["--flag-of-a-newer-release"], "0.32.99")
    with pytest.raises(UsageError, match="--help=all"):
        check_flags(["--qqqqqqqqqq"], f"{RELEASE}+cpu")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag-at-all", "1"], "unknown flag"),
        (["--kv-cache-memory-bytes", "64Mx"], "--kv-cache-memory-bytes: '64Mx' is no size"),
        (["--kv_cache_memory_bytes=0"], "above zero"),
        (["--max-body-size"], "is no size"),
    ],
)
def test_mistakes_are_one_line_without_importing_vllm(flags: list[str], words: str) -> None:
    code = (
        "import sys; from vllm_eigen import cli\n"
        "from vllm_eigen.server.commands import serve\n"
        f"serve.check_vllm_version = lambda: {RELEASE!r}\n"
        "status = cli.main(sys.argv[1:])\n"
        "sys.exit(9 if {'vllm', 'torch'} & set(sys.modules) else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "model", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.unit
def test_usage_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    known = [*listed()[1], *OURS]
    words = [word.split("=")[0].strip(",`)") for line in lines for word in line.split()]
    named = {word for word in words if word.startswith("--")}
    assert named - {"--help", "--bases-only"} <= set(known)


@pytest.fixture(scope="module")
def parser():  # type: ignore[no-untyped-def]
    pytest.importorskip("vllm")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made = own_module().make_arg_parser(FlexibleArgumentParser())
    made.flags_of_vllm = parser_flags(made)
    serve.add_own_arguments(made)
    return made


def test_the_list_is_that_of_vllm(parser) -> None:  # type: ignore[no-untyped-def]
    if check_vllm_version().split("+")[0] != RELEASE:
        pytest.skip(f"the list is that of vLLM {RELEASE}")
    assert listed()[1] == parser.flags_of_vllm


def test_vllms_parser_with_our_flags(parser) -> None:  # type: ignore[no-untyped-def]
    def parse(*arguments: str):  # type: ignore[no-untyped-def]
        return parser.parse_args(["model", *arguments])

    for text, size in (("64MiB", 64 << 20), ("4G", 4 << 30), ("4g", 4 * 10**9)):
        assert parse("--kv-cache-memory-bytes", text).kv_cache_memory_bytes == size
    parsed = parse("--open-routes", "/metrics", "/docs", "--max-body-size", "1MiB")
    assert parsed.open_routes == ["/metrics", "/docs"]
    assert parsed.max_body_size == 1 << 20
    assert parse("--open-routes").open_routes == []
    assert parse().open_routes is None
    assert parse().shutdown_timeout == serve.DRAIN_SECONDS
    for mistake in (
        ("--open-routes", "metrics"),
        ("--port", "x"),
        ("--kv-cache-memory-bytes", "x"),
    ):
        with pytest.raises(UsageError) as caught:
            parse(*mistake)
        assert "\n" not in str(caught.value)
