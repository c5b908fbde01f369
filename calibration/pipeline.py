"""The calibration from text to checkpoint, stage by stage.

    text -> moments -> bases -> ranks -> refit -> folded checkpoint

One pass streams the text through the layers (`layers`); then the ranks are chosen, a second pass
refits the output projections to them, and all is measured on held-out windows and written.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial
from typing import Any

from calibration.choose import choose_ranks, curve_rule
from calibration.layers import LayerPass
from calibration.measure import measure
from calibration.methods import get_method
from calibration.methods.base import LayerBases, Method
from calibration.options import Options
from calibration.predict import Prediction, predict
from calibration.progress import Reporter
from calibration.refit import refit, share, wanted
from calibration.scales import fit_scales
from calibration.source import Source, open_source
from calibration.state import State, remember_base
from calibration.stream import SPILL_LIMIT, Skeleton, Stream, pick_device
from calibration.text import Corpus, Windows, sample_windows
from calibration.write import eigen_config, write_bases, write_checkpoint
from vllm_eigen.checkpoint import EigenConfig
from vllm_eigen.errors import UsageError
from vllm_eigen.families import KeyMode

HELD_OUT = 8
"""Windows of the text kept from calibration for the numbers in the model card."""
_UNKNOWN_WARNING = 0.02


def calibrate(options: Options, reporter: Reporter) -> EigenConfig:
    """Make an Eigen checkpoint; returns its configuration.

    Raises:
        UsageError, InputError, OutputError: in one line what is wrong; nothing is written then.
    """
    options.check()
    method = get_method(options.method)
    device = pick_device(options.device)
    source = open_source(options.model)
    key_mode = _key_mode(options, source)
    head_group = _head_group(options, method, source)
    corpus = options.corpus()
    windows = _windows(options, source, corpus, reporter)
    statistics = method.statistics(key_mode, head_group)
    skeleton = Skeleton(source, device, eager=any(item.needs_probabilities for item in statistics))
    state = State(
        {
            "base": source.fingerprint,
            "tokens": hashlib.sha256(windows.chosen.numpy().tobytes()).hexdigest(),
            "method": method.name,
            "key_mode": key_mode,
            "head_group": head_group,
            "error_budget": options.error_budget,
            "full": options.kv_ratio == 1,
            "device": str(device),
        },
        resume=options.resume,
        provenance=options.provenance,
    )
    open_stream = partial(
        Stream,
        skeleton,
        spill_limit=SPILL_LIMIT if options.spill_limit is None else options.spill_limit,
        spill_folder=state.folder,
    )
    layer_pass = LayerPass(
        skeleton, method, key_mode, head_group, curve_rule(options, method.rank_rule)
    )
    results = layer_pass.run(open_stream(windows.chosen), state, reporter)
    bases = [result.bases for result in results]
    ranks, choice = choose_ranks(
        options,
        method.rank_rule,
        results,
        skeleton,
        windows.chosen,
        key_mode,
        state,
        reporter,
    )
    losses = choice.pop("loss_curves", None)
    spectrum = [_spectrum(item) for item in bases]
    compressed = skeleton
    choice["refit"] = wanted(options, method)
    if choice["refit"]:
        tokens = share(skeleton, windows.chosen)
        bases, compressed = refit(
            skeleton,
            open_stream(tokens),
            open_stream(tokens),
            bases,
            ranks,
            key_mode,
            head_group,
            state,
            reporter,
        )
    reporter.stage("scaling", skeleton.num_layers)
    ranks = fit_scales(compressed, windows.chosen, bases, ranks, key_mode, reporter.step)
    measured: dict[str, Any] = {}
    if len(windows.held_out):
        reporter.stage("measuring", skeleton.num_layers)
        quality = measure(
            skeleton,
            windows.held_out,
            bases,
            ranks,
            key_mode,
            reporter.step,
            compressed=compressed,
        )
        measured = asdict(quality)
    eigen = eigen_config(
        source,
        ranks,
        key_mode=key_mode,
        method=method.name,
        head_group=head_group,
        bases_only=options.bases_only,
        provenance={
            **state.provenance,
            "base": {"name": source.name, "fingerprint": source.fingerprint},
            "calibration": {
                "text": corpus.name,
                "samples": len(windows.chosen),
                "seq_len": windows.chosen.shape[1],
                "seed": options.seed,
                **choice,
            },
            "measured": measured,
        },
    )
    reporter.stage("writing", len(source.weights))
    write = write_bases if options.bases_only else write_checkpoint
    write(
        compressed.source,
        eigen,
        bases,
        options.output,
        details={"spectrum": spectrum, "loss_curves": losses},
        overwrite=options.overwrite,
        step=reporter.step,
    )
    remember_base(source.fingerprint, source.folder)
    state.discard()
    return eigen


def foresee(options: Options) -> Prediction:
    """What `calibrate` would give and cost; reads the configuration only.

    Raises:
        UsageError, InputError, OutputError: what it would refuse for the configuration alone.
    """
    options.check()
    method = get_method(options.method)
    device = pick_device(options.device)
    source = open_source(options.model, with_weights=False)
    return predict(
        source,
        method,
        kv_ratio=options.kv_ratio,
        samples=options.samples,
        length=options.length,
        key_mode=_key_mode(options, source),
        head_group=_head_group(options, method, source),
        device=device,
    )


def _spectrum(bases: LayerBases) -> dict[str, list[float]]:
    """Singular values by rank, averaged over heads, relative to the largest."""
    result: dict[str, list[float]] = {}
    for part, basis in (("key", bases.key), ("value", bases.value)):
        mean = basis.energy.sqrt().mean(0)
        scale = float(mean.max()) or 1.0
        result[part] = [float(f"{value / scale:.4g}") for value in mean.tolist()]
    return result


def _windows(options: Options, source: Source, corpus: Corpus, reporter: Reporter) -> Windows:
    windows = sample_windows(
        corpus,
        source.tokenizer(),
        samples=options.samples,
        length=min(options.length, source.max_positions),
        seed=options.seed,
        vocab_size=source.vocab_size,
        held_out=HELD_OUT,
    )
    if len(windows.chosen) < options.samples:
        reporter.note(
            f"note: the text gives {windows.available} windows, "
            f"calibrating on {len(windows.chosen)} instead of {options.samples}"
        )
    if windows.unknown > _UNKNOWN_WARNING:
        reporter.note(
            f"note: {windows.unknown:.0%} of the tokens are unknown to the tokenizer; "
            "is the text of the model's kind?"
        )
    return windows


def _key_mode(options: Options, source: Source) -> KeyMode:
    modes = source.family.key_modes
    chosen = options.key_mode or modes[0]
    if chosen not in modes:
        raise UsageError(
            f"--key-cache {chosen} does not fit {source.family.architecture}; "
            f"choose from {', '.join(modes)}"
        )
    return chosen


def _head_group(options: Options, method: Method, source: Source) -> int:
    heads = source.geometry.num_kv_heads
    if options.head_group is None:
        group = method.head_group
        while heads % group:
            group -= 1
        return group
    group = options.head_group
    if group > method.max_head_group:
        raise UsageError(
            f"--head-group {group}: method {method.name} goes up to {method.max_head_group}"
        )
    if heads % group:
        raise UsageError(f"--head-group {group} does not divide the model's {heads} KV heads")
    return group
