"""The catalogue of findings, one file a family, and its pages. Data, rendered; no torch."""

from __future__ import annotations

from ddpcall.findings import calls, control, data, gradients, replicas
from ddpcall.findings.finding import Finding, Place, Rule, Severity

__all__ = [
    "CATALOGUE",
    "Finding",
    "Place",
    "Rule",
    "Severity",
    "find_rule",
    "render_index",
    "render_page",
    "render_pages",
]

FAMILIES = {
    "DC1xx: gradients": gradients.RULES,
    "DC2xx: replicas": replicas.RULES,
    "DC3xx: calls": calls.RULES,
    "DC4xx: data and randomness": data.RULES,
    "DC5xx: control flow": control.RULES,
}
"""Rules by the heading that they are listed under."""

CATALOGUE: dict[str, Rule] = {rule.code: rule for rules in FAMILIES.values() for rule in rules}


def find_rule(code: str) -> Rule:
    """Return a rule by code or name, in any case.

    Raises:
        ValueError: There is none such; the message lists them.
    """
    for rule in CATALOGUE.values():
        if code.strip().lower() in (rule.code.lower(), rule.name):
            return rule
    raise ValueError(f"There is no finding {code!r}. There are: {', '.join(CATALOGUE)}.")


def render_page(rule: Rule) -> str:
    """Return a rule's page in Markdown."""
    links = "\n".join(f"* {link}" for link in rule.links)
    return f"""# {rule.code} {rule.name}

**{rule.severity}** · {rule.title}.

{rule.why}

```text
{rule.wrong}
```

**Write instead.** {rule.fix}

**Silent when.** {rule.silent_when}

**Blind to.** {rule.blind_to}

{links}
"""


def render_index() -> str:
    """Return the list of all rules in Markdown, by family."""
    return "\n".join(
        [
            "# Findings\n",
            "Written by `python -m ddpcall explain --write docs/findings`; "
            "`ddpcall explain DC101` prints a page.\n",
            *(_render_family(heading, rules) for heading, rules in FAMILIES.items()),
        ]
    )


def _render_family(heading: str, rules: tuple[Rule, ...]) -> str:
    rows = [f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.severity} | {rule.title} |" for rule in rules]
    return "\n".join(
        [f"## {heading}\n", "| code | name | severity | what |", "| --- | --- | --- | --- |", *rows, ""]
    )


def render_pages() -> dict[str, str]:
    """Return every page of docs/findings by file name."""
    return {"index.md": render_index(), **{f"{rule.code}.md": render_page(rule) for rule in CATALOGUE.values()}}
