"""A result as `parco fit` leaves it, small enough to read, with text in it that must not become markup."""

from __future__ import annotations

from parco.fitting.result import (
    SCHEMA,
    Alternative,
    Column,
    FrontierPoint,
    GroupRow,
    Passed,
    Result,
)

CHECKPOINT_BYTES = 27_000_000
MARKUP = "<script>alert('model')</script>"
BLOCKS = 4


def result() -> Result:
    """A whole, consistent result for a made-up model of four blocks."""
    return Result(
        schema=SCHEMA,
        parco="0.1.0",
        model="/models/tiny & <b>llama",
        architecture="LlamaForCausalLM",
        fingerprint="5f0c2a",
        parameters=13_500_000,
        checkpoint_bytes=CHECKPOINT_BYTES,
        folder="out/tiny-0.35",
        command="parco fit '/models/tiny & <b>llama' --size 0.35 --seed 0",
        seed=0,
        threads=2,
        target={"kind": "size", "value": 0.35, "reached": 0.3481, "met": True},
        plan={"schema": 1},
        data={
            "source": "the texts that come with parco",
            "sha256": "9b0d",
            "window": 512,
            "calibration_windows": 240,
            "check_windows": 16,
            "held_out_windows": 64,
            "compared_windows": 48,
            "generated_windows": 4,
        },
        prefill_tokens=512,
        original=_column("original", 1.0, 1.5012, 0.0, 1.0, 190.0, 4100.0),
        fitted=_column("fitted", 0.3481, 1.5187, 0.0141, 0.962, 251.0, 4230.0),
        frontier=_frontier(),
        groups=_groups(),
        alternatives=_alternatives(),
        remainder={
            "decode_seconds": 3.1e-3,
            "prefill_seconds": 0.02,
            "decode_share": 0.59,
            "prefill_share": 0.16,
            "explanation": "59% of the original's decode step is not in its matrices and no choice changes it.",
        },
        heal={
            "steps": 200,
            "tokens_per_step": 4096,
            "kl_before": 0.021,
            "kl_after": 0.0139,
            "curve": [[0, 0.021], [200, 0.0139]],
        },
        sample={
            "prompt": "def read(path):\n",
            "original": f"    # {MARKUP}\n    return open(path).read()",
            "fitted": "    with open(path) as file:\n        return file.read() & 1",
        },
        machine={
            "cpu": "Intel(R) Xeon(R) Platinum 8581C",
            "isas": ["generic", "avx2", "avx512"],
            "cores": 2,
            "memory": 16 << 30,
        },
        versions={"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        stages=[
            {"stage": "calibrate", "seconds": 41.0, "resumed": True},
            {"stage": "apply", "seconds": 55.2, "resumed": False},
            {"stage": "apply", "seconds": 44.8, "resumed": False},
        ],
        warnings=["Calibrated on parco's own text: MODEL came without --data."],
    )


def _column(name: str, fraction: float, loss: float, kl: float, top1: float, decode: float, prefill: float) -> Column:
    return Column(
        name=name,
        bytes=round(fraction * CHECKPOINT_BYTES),
        fraction=fraction,
        loss=loss,
        perplexity=2.718281828**loss,
        kl=kl,
        top1=top1,
        decode=decode,
        prefill=prefill,
        memory=round(4e8 + fraction * CHECKPOINT_BYTES),
    )


def _frontier() -> list[FrontierPoint]:
    points: list[FrontierPoint] = []
    for step, fraction in enumerate((0.2, 0.25, 0.3, 0.3481, 0.4, 0.5, 0.6, 0.8)):
        predicted = 0.0002 / fraction**4.2
        measured = predicted * 1.1 if 1 <= step <= 4 else None
        points.append(
            FrontierPoint(
                name=f"size {fraction:g}",
                plan=f"{step:04x}",
                summary=f"int5:64 x {4 + step}, int4:64 x {12 - step}, keep x 1",
                bytes=round(fraction * CHECKPOINT_BYTES),
                fraction=fraction,
                predicted_loss=predicted,
                measured_loss=measured,
                healed_loss=0.0139 if step == 3 else None,
                decode_seconds=2.5e-3 + 3e-3 * fraction,
                prefill_seconds=0.1 + 0.01 * fraction,
                measured_decode_seconds=2.6e-3 + 3e-3 * fraction if measured else None,
                measured_prefill_seconds=0.11 if measured else None,
                chosen=step == 3,
            )
        )
    return points


def _groups() -> list[GroupRow]:
    rows = [_group("model.embed_tokens", "embedding", {"model.embed_tokens": [8192, 384]}, "int6:64", 0.4)]
    for block in range(BLOCKS):
        at = f"model.layers.{block}"
        attention = {f"{at}.self_attn.{part}_proj": [384, 384] for part in "qkv"}
        rows += [
            _group(f"{at}.self_attn.qkv", "attention", attention, "int4:64", 0.28),
            _group(f"{at}.self_attn.o_proj", "attention", {f"{at}.self_attn.o_proj": [384, 384]}, "int5:64", 0.34),
            _group(
                f"{at}.mlp.gate_up",
                "mlp",
                {f"{at}.mlp.gate_proj": [1024, 384], f"{at}.mlp.up_proj": [1024, 384]},
                "factor(0.5)>>int8:row",
                0.25,
            ),
            _group(f"{at}.mlp.down_proj", "mlp", {f"{at}.mlp.down_proj": [384, 1024]}, "int8:row", 0.51),
        ]
    return rows


def _group(group: str, kind: str, members: dict[str, list[int]], method: str, kept: float) -> GroupRow:
    original = sum(2 * rows * columns for rows, columns in members.values())
    return GroupRow(
        group=group,
        kind=kind,
        members=list(members),
        shapes=list(members.values()),
        method=method,
        kernel="int-linear-avx512",
        bytes=round(kept * original),
        original_bytes=original,
        predicted_loss=0.00021,
        measured_error=0.0043 if kind != "embedding" else None,
        decode_seconds=2.1e-5,
        prefill_seconds=9.1e-4,
        original_decode_seconds=4.4e-5,
        original_prefill_seconds=9.5e-4,
        passed=[
            Passed(
                method="keep",
                bytes=original,
                predicted_loss=0.0,
                decode_seconds=4.4e-5,
                prefill_seconds=9.5e-4,
                reason="1.4 MB more for 0.0002 nats; the budget buys more elsewhere",
            ),
            Passed(
                method="int3:64",
                bytes=round(0.22 * original),
                predicted_loss=0.0031,
                decode_seconds=1.9e-5,
                prefill_seconds=9.2e-4,
                reason="0.0029 nats more for few bytes <saved>",
            ),
        ],
    )


def _alternatives() -> list[Alternative]:
    figures = (
        ("chosen plan", 0.3481, 1.5187, 0.0141, 0.962),
        ("int4:32", 0.3312, 1.5341, 0.0299, 0.942),
        ("int3:64", 0.2601, 1.6120, 0.1041, 0.891),
        ("factor(0.3)>>int8:row", 0.3402, 1.9021, 0.3912, 0.741),
    )
    return [
        Alternative(
            name=name,
            bytes=round(fraction * CHECKPOINT_BYTES),
            fraction=fraction,
            loss=loss,
            error=0.0031,
            kl=kl,
            top1=top1,
            healed_steps=200,
            chosen=name == "chosen plan",
        )
        for name, fraction, loss, kl, top1 in figures
    ]
