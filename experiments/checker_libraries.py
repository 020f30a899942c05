"""Checks the rules of JAX and of libraries on top of it: every custom_vjp and custom_jvp that a name leads to.

Run from the repository, in an environment of its own with the libraries and jaxbp[run], which `make` does not make:
``python -m experiments.checker_libraries [LIBRARY …]``, an hour for all on two busy cores. --config tells the arguments
that cannot be found out, configs/checker_findings.toml what verdicts other than PASS come from. Each library that is
named replaces its part of checker_libraries.json, and the table in checker_libraries.md is written anew.
"""

import importlib.metadata
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import report
from jaxbp.checker import arguments, finder
from jaxbp.checker.survey import Entry, Survey, examined

CONFIG = Path(__file__).parent / "configs" / "checker_libraries.toml"
FINDINGS = CONFIG.with_name("checker_findings.toml")
PACKAGES = {  # by the name of the distribution
    **{name: name for name in ("jax", "optax", "flax", "equinox", "distrax", "rlax", "jaxopt", "optimistix")},
    **{name: name for name in ("diffrax", "lineax", "numpyro")},
    **{"ott-jax": "ott", "tfp-nightly": "tensorflow_probability.substrates.jax"},
}


def survey(library: str, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The counts and the rules of a library, with the first cause of what did not pass."""
    package = PACKAGES[library]
    modules, failed = finder.modules(package)
    entries = []
    for rule in finder.rules(modules):
        entries.append(examined(rule, tables.get(rule.name)))
        print(entries[-1], file=sys.stderr, flush=True)
    whole = Survey(package, tuple(entries), tuple(failed))
    rules = [summary(entry) for entry in entries]
    return {"version": importlib.metadata.version(library), "counts": whole.counts, "failed": failed, "rules": rules}


def summary(entry: Entry) -> dict[str, str]:
    """An entry without its rows."""
    cause = str(entry.report).splitlines()[1].strip() if entry.report and not entry.report.passed else entry.reason
    rule = {"name": entry.rule.name, "kind": entry.rule.kind, "verdict": entry.verdict}
    return rule | {"arguments": entry.arguments, "cause": cause}


HEAD = """# The checker: rules of libraries

Every `custom_vjp` and `custom_jvp` that a name of the library leads to, checked at level fast. Each FAIL was looked
into, the faults by other means. Not exercised: no arguments could be found out. Skipped: see the reasons below. A PASS
that is listed is a fault that was not seen, or one of the function itself. What is not exercised in tfp-nightly, and
optimistix, diffrax, lineax and numpyro, were checked by an earlier version of the checker. {}.
"""
KINDS = "Fault", "On purpose", "False alarm"  # with which a finding begins


def page(results: Mapping[str, Mapping[str, Any]], findings: Mapping[str, str]) -> str:
    """The table, and what did not pass with the finding about it."""
    columns = [*next(iter(results.values()))["counts"]]
    lines = [HEAD.format(f"JAX {jax.__version__}, {jax.default_backend()}")]
    lines += [row("library", "version", *columns, *KINDS), row(*["---"] * (5 + len(columns)))]
    for library, found in results.items():
        about = [findings.get(rule["name"], "") for rule in found["rules"]]
        kinds = [sum(text.startswith(kind) for text in about) for kind in KINDS]
        lines.append(row(library, found["version"], *found["counts"].values(), *kinds))
    listed = [rule for found in results.values() for rule in found["rules"]]
    rules = [rule for rule in listed if rule["verdict"] != "PASS" or rule["name"] in findings]
    for verdict in dict.fromkeys(sorted(rule["verdict"] for rule in rules)):
        lines += ["", f"## {verdict}", ""]
        for rule in rules:
            if rule["verdict"] == verdict:
                parts = f"`{rule['name']}`:", findings.get(rule["name"], ""), rule["cause"].removeprefix(f"{verdict} ")
                lines.append(f"- {' '.join(part for part in parts if part)}")
    return "\n".join(lines) + "\n"


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments_: Sequence[str] | None = None) -> None:
    """Surveys the libraries that are named, by default all."""
    parser = report.parser(__doc__, CONFIG, "a TOML of arguments, as `jaxbp check --arguments` takes it")
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", choices=[*PACKAGES, []], help=", ".join(PACKAGES))
    with report.study("checker_libraries", parser, arguments_) as study:
        options = study.options
        tables = arguments.read(options.config)
        findings = tomllib.loads(FINDINGS.read_text(encoding="utf-8"))
        file = options.out / "checker_libraries.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for library in options.libraries or PACKAGES:
            results[library] = survey(library, tables)
            jax.clear_caches()
            report.save(options.out, "checker_libraries", {name: results[name] for name in PACKAGES if name in results})
        (options.out / "checker_libraries.md").write_text(page(results, findings), encoding="utf-8")


if __name__ == "__main__":
    main()
