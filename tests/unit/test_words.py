"""Documents, docstrings, comments, log lines, errors and names of tests use the usual words and short sentences."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("host", "proto", "metrics", "network", "images", "runtime", "cri", "cli", "scripts", "manifests", "tests")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]

# A word that readers stumble over, as a regular expression, and what to write in its place.
USUAL = {
    r"all the same": "anyway",
    r"anew": "again",
    r"asunder|betimes|forthwith|hither|thereof|thereby|whence|wherein|whither": "a word of today",
    r"at fault": "caused it: say what failed",
    r"(?:be|been|is|are|was|were) (?:not )?told": "gets, is notified, is asked, is logged: say by whom",
    r"beforehand": "before",
    r"(?:is|are) fine": "is no error",
    r"but for": "except for",
    r"c[ao]me to be": "is completed",
    r"c[ao]mes? of": "results from",
    r"cut short": "interrupted",
    r"for want of": "for lack of",
    r"g[io]ven? back|gives? back|gave back|giving back": "release",
    r"goes on|going on|go on|went on": "continue, keep running, stay open",
    r"half-made": "partly made, incomplete",
    r"held against": "compared with",
    r"h[eo]ld(?:s|ing)? up": "delay",
    r"in the midst": "during",
    r"in vain": "without effect",
    r"in there": "in it",
    r"(?:is|are|was|were) not there": "is missing, does not exist",
    r"in (?:its|their) stead": "instead",
    r"lest": "so that ... not",
    r"leads? in circles": "forms a loop",
    r"let(?:s|ting)? go": "release, allow to continue",
    r"lets": "allows",
    r"lies|lie": "is in, is on, is below",
    r"lived on|lives on": "survived, keeps running",
    r"nobody|no one": "no client, no caller, no process: say who",
    r"makes? no sense": "is invalid",
    r"none the (?:\w+)": "say what does not change",
    r"of (?:its|their|his|our|your) own": "its own, separate, a new",
    r"of yore|of old": "earlier",
    r"somebody|someone": "a client, another program: say who",
    r"speaks?|spoken|spoke": "support, use",
    r"stands?|stood": "is, means, represents",
    r"strangers?": "other processes, unknown clients",
    r"takes? after": "inherits",
    r"taken for|takes? \w+ for (?:a|an|the|one|granted)": "mistaken for, treated as, read as",
    r"tells?|telling": "says, reports, shows, sends, calls",
    r"unsound": "invalid",
    r"to be had": "available",
    r"visitors?": "clients, threads: say what they are",
    r"vouch(?:es|ed)?": "signs",
    r"whatever": "any, regardless of",
    r"whereupon": "then",
    r"(?:write|writes|written|wrote|writing) (?:it |them |that )?down": "record",
    r"whoever|whomever|whosoever": "the client that, the program that: say who",
}
BANNED = [(re.compile(rf"\b(?:{words})\b", re.IGNORECASE), usual) for words, usual in USUAL.items()]
QUOTED = re.compile(r"``.*?``|`[^`]*`|\"[^\"]*\"", re.DOTALL)

# Words of a sentence, at most. The aim is 25; a list of names in a sentence may take it further.
MAX_WORDS = 35

_LOG_CALLS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
_HELP = {"help", "description", "epilog"}

Text = tuple[int, str]


def sources() -> list[Path]:
    """The modules of the product and its tests, without generated ones."""
    return sorted(path for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py") if "_pb2" not in path.name)


def comments(source: str) -> Iterator[Text]:
    """Each block of comment lines of a module, with the line where it begins."""
    begin, end, parts = 0, -1, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != end + 1 and parts:
            yield begin, " ".join(parts)
            parts = []
        if not parts:
            begin = token.start[0]
        end = token.start[0]
        parts.append(token.string.lstrip("#! "))
    if parts:
        yield begin, " ".join(parts)


def docstrings(tree: ast.Module) -> Iterator[Text]:
    """The docstrings of a module, its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def messages(tree: ast.Module) -> Iterator[Text]:
    """The texts of errors that are raised, of log lines, and of the command line's help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            yield from _strings(node)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in _LOG_CALLS:
                yield from _strings(node)
            for keyword in node.keywords:
                if keyword.arg in _HELP:
                    yield from _strings(keyword.value)


def _strings(node: ast.AST) -> Iterator[Text]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.lineno, part.value


def texts(path: Path) -> Iterator[Text]:
    """All that a module says to its readers and users."""
    source = path.read_text()
    tree = ast.parse(source)
    yield from docstrings(tree)
    yield from comments(source)
    if not path.is_relative_to(ROOT / "tests"):  # tests pass text of all kinds
        yield from messages(tree)


def prose(document: Path) -> Iterator[Text]:
    """The paragraphs, list items and cells of tables of a document, without code."""
    text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), document.read_text(), flags=re.S | re.M)
    begin, parts = 0, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        starts = re.match(r"\s*(?:[*#|]|\d+\. |$)", line) is not None
        if starts and parts:
            yield begin, " ".join(parts)
            parts = []
        if line.startswith("|"):
            yield from ((number, cell) for cell in line.split("|"))
        elif line.strip():
            if not parts:
                begin = number
            parts.append(line.strip())


def unusual(path: Path, found: Iterator[Text]) -> list[str]:
    """A complaint for each banned word."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}: write instead: {usual}"
        for line, text in found
        for pattern, usual in BANNED
        for match in pattern.finditer(QUOTED.sub("", text))
    ]


def test_documents_use_the_usual_words() -> None:
    assert [complaint for document in DOCUMENTS for complaint in unusual(document, prose(document))] == []


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_comments_logs_and_errors_use_the_usual_words(room: str) -> None:
    modules = [path for path in sources() if path.relative_to(ROOT).parts[0] == room]
    assert [complaint for path in modules for complaint in unusual(path, texts(path))] == []


def test_comments_of_protocols_use_the_usual_words() -> None:
    """``.proto`` files: a comment is all that a client's author reads of a call."""
    paths = sorted((ROOT / "proto").rglob("*.proto"))
    assert len(paths) > 4
    for path in paths:
        lines = [line.partition("//") for line in path.read_text().splitlines()]
        found = [(number, words) for number, (_, mark, words) in enumerate(lines, 1) if mark]
        assert unusual(path, iter(found)) + long_sentences(path, iter(found)) == []


def test_names_of_tests_use_the_usual_words() -> None:
    """The name of a test says who does what to which object."""
    names = [
        (node.lineno, node.name.replace("_", " "), path)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 2000
    assert [complaint for line, name, path in names for complaint in unusual(path, iter([(line, name)]))] == []


def test_log_lines_name_their_object_first() -> None:
    """A log line is ``object: event: details``; one whose whole text is passed as ``%s`` is made elsewhere."""
    lines = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {text}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _logs(node)
        for text in [_first_text(node)]
        if text is not None and text != "%s" and ": " not in text
    ]
    assert lines == []


def _logs(call: ast.Call) -> bool:
    to = call.func.value if isinstance(call.func, ast.Attribute) and call.func.attr in _LOG_CALLS else None
    return isinstance(to, ast.Name) and to.id in ("_log", "log", "logger")


def _first_text(call: ast.Call) -> str | None:
    return next((part.value for part in call.args if isinstance(part, ast.Constant) and type(part.value) is str), None)


def long_sentences(path: Path, found: Iterator[Text]) -> list[str]:
    """A complaint for each sentence with more than MAX_WORDS."""
    return [
        f"{path.relative_to(ROOT)}:{line}: a sentence of {len(sentence.split())} words: {sentence[:60]}..."
        for line, text in found
        for paragraph in text.split("\n\n")
        for sentence in re.split(r"(?<=[.!?:;])\s", " ".join(paragraph.split()))
        if len(sentence.split()) > MAX_WORDS
    ]


def test_sentences_of_documents_are_short() -> None:
    assert [complaint for document in DOCUMENTS for complaint in long_sentences(document, prose(document))] == []


def test_sentences_of_docstrings_are_short() -> None:
    assert [c for path in sources() for c in long_sentences(path, docstrings(ast.parse(path.read_text())))] == []


def test_a_banned_word_is_found_where_it_is(tmp_path: Path) -> None:
    """The check itself: each kind of text is read, with its line, and quoted names are left out."""
    module = tmp_path / "module.py"
    module.write_text(
        '"""Nobody."""\n\n# It tells\n# two lines.\n'
        'def f() -> None:\n    """``told`` and `lets`."""\n    raise ValueError(f"it is {1} of its own")\n'
    )
    found = [
        (line, match[0])
        for line, text in texts(module)
        for pattern, _ in BANNED
        for match in pattern.finditer(QUOTED.sub("", text))
    ]
    assert found == [(1, "Nobody"), (3, "tells"), (7, "of its own")]
