"""American spelling, as PyTorch's, in code, messages and docs."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BRITISH = re.compile(
    r"""(synchron|initial|final|serial|recogn|normal|summar|organ|minim|maxim|optim|general|special|util|memor|categor
    |parametr|vector|quant|token|regular|random|custom|equal|stabil|visual|symbol|local|material|character|standard
    |priorit|linear|author)is(e[ds]?|ers?|ing|ations?)\b
    |analys(ed|ing)\b|behaviour|colour|honour|favour|neighbour|labelled(?!by)|labelling|modell(ed|ing)|travell(ed|ing)
    |licence|judgement|artefact|whilst|learnt|spelt|defence|signall(ed|ing)|\bcentred?\b|programme\b""",
    re.IGNORECASE | re.VERBOSE,
)


def test_words_are_spelled_as_in_pytorch():
    # Scripts of the corpus are written as their authors write them.
    command = ["git", "ls-files", "src", "docs", "conf", "launch", "bench", "tests", "*.md", ":!tests/corpus/*/*"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    files = [ROOT / name for name in listed if name and not name.endswith((".png", "test_spelling.py"))]
    assert len(files) > 300
    found = {
        f"{path.relative_to(ROOT)}:{number}": word[0]
        for path in files
        if path.exists()
        for number, line in enumerate(path.read_text().split("\n"), 1)
        if (word := BRITISH.search(line))
    }
    assert found == {}
