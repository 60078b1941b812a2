"""Line counts and density of the code, checked in CI and not in the tests: a fork may differ.

Dense constructs: comprehensions, conditional expressions, walruses, lambdas, starred expressions and
tuple assignments. Prints one line per file; exits with 1 if something is over its limit.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

DENSE = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.NamedExpr,
         ast.Starred, ast.Lambda)
CODE = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
LINES = {  # file -> most lines
    "model.py": 262, "rlhf.py": 1265, "parallel.py": 68, "data/files.py": 283, "data/fable.py": 689,
    "data/prepare.py": 528, "data/label.py": 332, "data/gpt2.py": 227, "patches/run.py": 123,
    "patches/check.py": 90
}
TOKENS = 11.5  # most tokens per line of code
DENSITY = 10.0  # most dense constructs per 100 lines of code

def tokens_per_line(source: str) -> dict[int, int]:
    """{line: tokens} of the lines of code, without docstrings."""
    counts = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.line.strip().startswith('"""')
        if token.type in CODE and not is_docstring and token.start[0] == token.end[0]:
            counts[token.start[0]] = counts.get(token.start[0], 0) + 1
    return counts

def dense_constructs(source: str) -> int:
    count = 0
    for node in ast.walk(ast.parse(source)):
        count += isinstance(node, DENSE)
        count += isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    return count

def main() -> None:
    failed = False
    for name, most_lines in LINES.items():
        source = Path(name).read_text(encoding="utf-8")
        lines = source.splitlines()
        code = tokens_per_line(source)
        tokens = sum(code.values()) / len(code)
        density = 100 * dense_constructs(source) / len(code)
        longest = max(len(line) for line in lines)
        wide = sum(len(line) >= 95 for line in lines)
        print(f"{name:20} {len(lines):5} of {most_lines} lines, {tokens:.1f} tokens a line, "
              f"{density:.1f} dense, {wide} wide, longest {longest}")
        if len(lines) > most_lines or tokens > TOKENS or density > DENSITY:
            failed = True
        if longest > 100 or 20 * wide > len(lines):  # at most one line in twenty has 95 columns
            failed = True
    sys.exit(failed)

if __name__ == "__main__":
    main()
