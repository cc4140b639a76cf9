"""What exists in the repository, for `unit/test_names_in_prose.py`: names, flags, files, and the prose about them.

Everything is read from syntax trees, scripts and the tree of files. Of the package only the settings are imported,
which need no torch.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from megatron_lrc.config import SETTINGS

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_lrc", "tools", "benchmarks", "examples", "tests")
#: Folders that commands make in a checkout.
MADE = ("demo", "runs", "build", "dist", "comparison")
DEFINITIONS = {
    ast.ClassDef,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Assign,
    ast.AnnAssign,
    ast.Import,
    ast.ImportFrom,
}
CONTEXTS = {ast.Load, ast.Store, ast.Del}


class Names:
    """What the code has, and what its docstrings and comments say.

    used: every identifier in code: definitions, parameters, attributes, imports; and strings that are identifiers.
    strings: words of short string constants, among them the names of the files that the code writes.
    chains: name.attribute, as code has it.
    members: class -> what it defines.
    top_level: module -> what it defines.
    flags, prefixes: whole flags, and the beginnings of those that end in a variable.
    prose: (where, text).
    """

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.strings: set[str] = set()
        self.chains: set[str] = set()
        self.members: dict[str, set[str]] = {}
        self.bases: dict[str, set[str]] = {}
        self.top_level: dict[str, set[str]] = {}
        self.flags = {f"--{prefix}{name.replace('_', '-')}" for name in SETTINGS for prefix in ("", "no-")}
        self.prefixes: set[str] = set()
        self._is_test = False
        self.prose: list[tuple[str, str]] = []
        self.paths = {path.relative_to(ROOT).as_posix() for path in _tree(ROOT)}
        #: Every path and every end of one, without .py too: modules.
        self.ends = {"/".join(path.split("/")[start:]) for path in self.paths for start in range(path.count("/") + 1)}
        self.modules = {end.removesuffix(".py") for end in self.ends}
        for path in sorted(self.paths):
            if path.endswith(".py") and path.startswith(FOLDERS) and path != "tests/unit/test_names_in_prose.py":
                self._read_python(path)
            elif path == "Makefile" or path.endswith((".sh", ".sbatch", ".js")):
                self._read_script(path)

    def _read_script(self, path: str) -> None:
        code = re.sub(r"^\s*#.*", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
        self.flags.update(re.findall(r"--[a-z][a-z0-9-]+", code))
        self.used.update(re.findall(r"\w+", code))
        self.strings.update(re.findall(r"[\w.-]+", code))

    def _read_python(self, path: str) -> None:
        source = (ROOT / path).read_text(encoding="utf-8")
        module = ast.parse(source)
        self._is_test = path.startswith("tests/")
        stem = Path(path).parent.name if path.endswith("__init__.py") else Path(path).stem
        self.top_level.setdefault(stem, set()).update(name for part in module.body for name in _defined_by(part))
        docstrings = self._visit(module, set())
        self.prose += [(path, text) for text in docstrings]
        if re.search(r"#.*`", source):
            tokens = tokenize.generate_tokens(io.StringIO(source).readline)
            comments = [token for token in tokens if token.type == tokenize.COMMENT]
            self.prose += [(f"{path}:{comment.start[0]}", comment.string) for comment in comments]

    def _visit(self, node: ast.AST, members: set[str]) -> list[str]:
        """Note what a tree has, and what it defines in `members`, of the class that it is in. Gives the docstrings."""
        docstrings: list[str] = []
        kind = type(node)
        if kind is ast.Attribute:
            self.used.add(node.attr)
            if type(node.value) is ast.Attribute:
                self.chains.add(f"{node.value.attr}.{node.attr}")
            elif type(node.value) is ast.Name:
                self.chains.add(f"{node.value.id}.{node.attr}")
                if node.value.id == "self":
                    members.add(node.attr)
        elif kind is ast.Name:
            self.used.add(node.id)
        elif kind is ast.Constant:
            if type(node.value) is str:
                self._note_string(node.value)
        elif kind in (ast.arg, ast.keyword):
            self.used.add(node.arg or "")
        elif kind in DEFINITIONS:
            members |= (defined := _defined_by(node))
            self.used |= defined
            if kind is ast.ImportFrom:
                self.used.update((node.module or "").split("."))
        elif kind is ast.JoinedStr and node.values and type(first := node.values[0]) is ast.Constant:
            self.prefixes.update(re.findall(r"^--[a-z-]+-$", str(first.value)))
        elif kind is ast.Call and type(node.func) is ast.Attribute and node.func.attr == "add_argument":
            self.flags.update(part.value for part in node.args if type(part) is ast.Constant)
        if kind is ast.ClassDef:
            members = self.members.setdefault(node.name, set())
            self.bases.setdefault(node.name, set()).update(ast.unparse(base).rpartition(".")[2] for base in node.bases)
        for field in node._fields:
            value = getattr(node, field, None)
            for child in value if type(value) is list else (value,):
                if type(child) is ast.Expr and type(child.value) is ast.Constant and type(child.value.value) is str:
                    docstrings.append(child.value.value)  # a text that stands by itself
                elif isinstance(child, ast.AST) and type(child) not in CONTEXTS:
                    docstrings += self._visit(child, members)
        return docstrings

    def _note_string(self, text: str) -> None:
        """Tests pass flags that do not exist, to see them refused; so theirs do not count."""
        if len(text) < 60:
            self.strings.update(re.findall(r"[\w.-]+", text))
        if re.fullmatch(r"[\w.-]+", text):
            self.used.update(re.split(r"[.-]", text))
        if not self._is_test and re.fullmatch(r"--[a-z][a-z0-9-]+", text):
            self.flags.add(text)

    def has_member(self, cls: str, name: str) -> bool:
        """Whether a class of ours has it; of what inherits from others' classes any name that is used will do."""
        if cls not in self.members:
            return name in self.used
        return name in self.members[cls] or any(self.has_member(base, name) for base in self.bases[cls])

    def is_module(self, parts: list[str]) -> bool:
        return "/".join(parts) in self.modules


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name for line in re.findall(r"^([\w -]+):", text, re.MULTILINE) for name in line.split()}


def _tree(folder: Path) -> Iterator[Path]:
    """The files and folders of the project, without what is made in it."""
    for path in folder.iterdir():
        is_made = path.name == "__pycache__" or path.suffix == ".egg-info" or (folder == ROOT and path.name in MADE)
        if not is_made and (path.name == ".github" or not path.name.startswith(".")):
            yield path
            if path.is_dir():
                yield from _tree(path)


def _defined_by(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {part for alias in node.names for part in (alias.asname or alias.name).split(".")}
    return set()
