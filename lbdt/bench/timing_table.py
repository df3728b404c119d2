"""A result as text: one table per op, then what was left out and the targets."""

from __future__ import annotations

from typing import Any

_MB = 1e6
_SHOWN_LIMITS = "measured: {read:.1f} GB/s, product {rate:.0f} GFLOP/s in {dtype}"


def lines(result: dict[str, Any]) -> list[str]:
    """The lines that `lbdt bench` prints."""
    versions = result["versions"]
    known = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "cuda", "driver") if versions[name]
    )
    text = [
        f"{result['device']['name']}, {result['threads']} threads, load {result['load_average_before']} before; "
        f"lbdt {versions['lbdt']}, {known}; commit {result['commit'][:7] or 'unknown'}"
        f"{' + changes' if result['dirty'] else ''}"
    ]
    for dtype, limits in result["limits"].items():
        read, rate = limits["bytes_per_second"] / 1e9, limits["flops_per_second"] / 1e9
        text.append(_SHOWN_LIMITS.format(read=read, rate=rate, dtype=dtype))
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        text += ["", f"{op}", *_table([row for row in result["rows"] if row["op"] == op])]
    if result["unet"]:
        text += ["", *_unet(result["unet"])]
    text += [f"left out: {name}: {reason}" for name, reason in result["skipped"].items()]
    if result["targets"]:
        text.append("")
    for target in result["targets"] or []:
        got = "nothing" if target["got"] is None else f"{target['got']:.3g}"
        text.append(f"{'met' if target['met'] else 'MISSED'}: {target['target']}, got {got}")
    return text


def _table(rows: list[dict[str, Any]]) -> list[str]:
    baselines = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    head = ["shape", "case", "backend", "lbdt, ms (p20-p80)"]
    graph = any("graph" in row["versions"]["ours"] for row in rows)
    cold = any("own_cold_ms" in row["versions"]["ours"] for row in rows)
    head += ["in a graph, ms"] * graph + ["cold, ms"] * cold
    for name in baselines:
        head += [f"{name}, ms", *["cold, ms"] * cold, "ratio"]
    head += ["floor, ms", "x floor", "extra MB: lbdt", *baselines]
    cells = [head]
    for row in rows:
        ours = row["versions"]["ours"]
        case = "" if row["share"] is None else f"{row['share']:.0%}"
        case = ", ".join(part for part in (case, row["variant"]) if part) or "-"
        if len({other["dtype"] for other in rows}) > 1:
            case += f", {row['dtype']}"
        low, high = (_ms(ours["ms"][name] - ours["ms"]["median"] + ours["own_ms"]) for name in ("p20", "p80"))
        line = [row["shape"], case, row["backend"], f"{_ms(ours['own_ms'])} ({low}-{high})"]
        if graph:
            warm = ours.get("graph", {}).get("warm")
            line.append(_ms(warm["median"]) if warm else "-")
        if cold:
            line.append(_ms(ours["own_cold_ms"]))
        for name in baselines:
            there = name in row["ratio"]
            line.append(_ms(row["versions"][name]["own_ms"]) if there else "-")
            if cold:
                line.append(_ms(row["versions"][name]["own_cold_ms"]) if there else "-")
            line.append(f"{row['ratio'][name]:.3g}x" if there else "-")
        line += [f"{_ms(row['floor']['ms'])} ({row['floor']['bound']})", f"{row['times_the_floor']:.3g}"]
        line += [_memory(row["versions"].get(name)) for name in ("ours", *baselines)]
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    text = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def _unet(step: dict[str, Any]) -> list[str]:
    text = [f"UNet step ({step['sizes']}): {_ms(step['step_ms']['median'])} ms"]
    for name in ("present", "absent"):
        part = step[name]
        line = f"hook, concept {name} as measured ({part['candidates']:.1%} of patches candidates, {part['share']:.1%} "
        line += f"detected): {_ms(part['hook_ms'])} ms, "
        line += f"{part['percent_of_step']:.3g} % of the step"
        if part["growth_percent"] is not None:
            line += f"; the step with it became {part['growth_percent']:+.3g} % longer"
        text.append(line)
    return text


def _ms(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _memory(version: dict[str, Any] | None) -> str:
    return "-" if version is None else f"{version['allocated_bytes'] / _MB:.1f}"
