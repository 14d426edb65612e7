"""Move the package's modules into their rooms, and give everything the field's words.

One table of what was called how. The rewriting goes by the syntax tree, not by text: an attribute, a keyword or a key is
renamed where its receiver says that it is the one that is meant. Chapters and pages are done too: their code cells, the
Python in their solutions, and words in backticks. Run again after a merge, it does what is left and nothing else:

    python tools/rename.py              # rewrite the tree
    python tools/rename.py --check      # list what would change
    python tools/rename.py --keep-outputs   # recorded outputs stay with the renamed cells until they are run again
"""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (
    "utils/**/*.py",
    "tests/**/*.py",
    "tools/*.py",
    "benchmarks/*.py",
    "chapters/*.md",
    "book/**/*.md",
)
TEXTS += ("book/**/*.py", "*.md")
OWN = Path(__file__).name

# Files and where they live now.
MOVES = {
    "utils/answers.py": "utils/evaluation/answers.py",
    "utils/arithmetic.py": "utils/data/arithmetic.py",
    "utils/assets": "utils/course/assets",
    "utils/chat.py": "utils/hf/chat.py",
    "utils/checks": "utils/course/checks",
    "utils/data.py": "utils/data/corpus.py",
    "utils/evaluate.py": "utils/evaluation/exact_match.py",
    "utils/finetune.py": "utils/commands/finetune.py",
    "utils/gguf.py": "utils/hf/gguf.py",
    "utils/hlo.py": "utils/commands/hlo.py",
    "utils/hosted.py": "utils/course/colab.py",
    "utils/hub.py": "utils/hf/hub.py",
    "utils/intervals.py": "utils/evaluation/intervals.py",
    "utils/mirror.py": "utils/hf/mirror.py",
    "utils/models.py": "utils/hf/models.py",
    "utils/peft_format.py": "utils/hf/peft.py",
    "utils/plan.py": "utils/commands/plan.py",
    "utils/plot.py": "utils/course/plot.py",
    "utils/problems.py": "utils/data/problems.py",
    "utils/profile.py": "utils/course/profile.py",
    "utils/reviews.py": "utils/course/reviews.py",
    "utils/sft.py": "utils/data/sft.py",
    "utils/stories.py": "utils/course/stories.py",
    "utils/tokenizer.py": "utils/course/tokenizer.py",
    "utils/weights.py": "utils/hf/weights.py",
}

# Names that left the module they were in: (old module, name) -> (new module, name).
NAMES = {
    **{("data", n): ("utils.course.row_packing", n) for n in ("Packed", "pad_rows", "concat_then_split", "best_fit")},
    **{("data", n): ("utils.data.packing", n) for n in ("Windows", "batches")},
    **{("data", n): ("utils.course.sources", n) for n in ("load_stories", "load_sst2")},
    ("weights", "save_random"): ("utils.course.random_checkpoint", "save"),
    ("plan", "estimate"): ("utils.course.estimate", "bytes_per_chip"),
    ("data", "place"): ("utils.data.packing", "assign_rows"),
    **{("evaluate", n): ("utils.evaluation.perplexity", n) for n in ("Score", "windows", "bits_per_character")},
    ("evaluate", "exact_match"): ("utils.evaluation.exact_match", "evaluate"),
    ("models", "find"): ("utils.hf.hub", "model"),
    ("minigpt", "load"): ("utils.course.pretrained", "load"),
    ("minigpt", "KEPT"): ("utils.course.pretrained", "MINIGPT"),
    ("minigpt", "save"): ("utils.course.pretrained", "save"),
    ("minigpt", "named_arrays"): ("utils.checkpoints", "named_parameters"),
    ("checkpoints", "written_whole"): ("utils.checkpoints", "atomic_dir"),
    ("minigpt", "attend"): ("utils.attention", "attention"),
    ("transformer", "attend"): ("utils.attention", "attention"),
    ("transformer", "rope"): ("utils.rope", "apply_rope"),
    ("transformer", "rope_tables"): ("utils.rope", "rope_tables"),
    ("transformer", "Llama3Scaling"): ("utils.rope", "Llama3Scaling"),
    ("transformer", "few_rows"): ("utils.kernels.cpu", "small_batch_matvec"),
    ("transformer", "few_rows_options"): ("utils.kernels.cpu", "compiler_options"),
    ("transformer", "pairs"): ("utils.kernels.cpu", "pack_bfloat16"),
    ("transformer", "FEW"): ("utils.kernels.cpu", "SMALL_BATCH"),
    ("transformer", "on_cpu"): ("utils.kernels", "on_cpu"),
    ("transformer", "working_dtype"): ("utils.kernels", "activation_dtype"),
    ("transformer", "compiling_for"): ("utils.kernels", "compiling_for"),
    ("transformer", "product"): ("utils.kernels", "mixed_precision_einsum"),
    ("transformer", "linear"): ("utils.kernels", "linear"),
    ("lora", "swap"): ("utils.lora", "set_adapter"),
    ("lora", "combine"): ("utils.lora", "add_weighted_adapter"),
    ("lora", "save_adapter"): ("utils.hf.peft", "save"),
    ("lora", "load_adapter"): ("utils.hf.peft", "load"),
    ("peft_format", "save_adapter"): ("utils.hf.peft", "save"),
    ("peft_format", "load_adapter"): ("utils.hf.peft", "load"),
    ("peft_format", "read_adapter"): ("utils.hf.peft", "read"),
    ("sharding", "place"): ("utils.sharding", "device_put"),
    ("sharding", "gather"): ("utils.sharding", "all_gather"),
    ("sharding", "parts"): ("utils.course.plot", "parts"),
    ("sharding", "picture"): ("utils.course.plot", "sharding"),
    ("finetune", "Config"): ("utils.commands.options", "Finetune"),
    ("finetune", "ALL_LINEAR"): ("utils.lora", "ALL_LINEAR"),
    ("finetune", "FREE"): ("utils.commands.options", "FREE"),
    ("profile", "keep_memory"): ("utils.kernels.cpu", "keep_memory"),
    ("train", "placed"): ("utils.train", "device_put_batch"),
    ("train", "write_metrics"): ("utils.commands.finetune", "write_metrics"),
}  # fmt: skip

# Attributes and keywords with one meaning wherever they stand.
EVERYWHERE = {
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "qkv_bias": "attention_bias",
    "o_bias": "o_proj_bias",
    "rank_stabilised": "use_rslora",
    "eos_ids": "eos_token_id",
    "eos_id": "eos_token_id",
    "bos_id": "bos_token_id",
    "tied": "tie_word_embeddings",
    "remat": "gradient_checkpointing",
    "segments": "segment_ids",
    "warmup": "warmup_steps",
    "window": "max_seq_length",
    "accumulate": "gradient_accumulation_steps",
    "original_context": "original_max_position_embeddings",
}
# Attributes and keywords with other meanings too: `attributes` are renamed on these receivers, `keywords` in these calls.
CONFIG = r"(self\.)?(config|c|sizes|size|CONFIG|R1|r1|llama|qwen|old|base\.config|big|made\.config|small_config|args)"
CONFIG += r"|\w+(\.model)?\.config|config_of\(.*"
SIZES = r"(\w+\.)*(Config|replace|dict|SimpleNamespace|Namespace|model|wild|report|fit|rewrite|sizes|with_config)"
SOMEWHERE = {
    "width": ("hidden_size", CONFIG + r"|small", SIZES),
    "layers": ("num_hidden_layers", CONFIG, SIZES),
    "heads": ("num_attention_heads", CONFIG + r"|self|attention", SIZES),
    "context": ("max_position_embeddings", CONFIG.replace("|size|", "|").replace("|args", ""), SIZES),
    "architecture": ("model_type", CONFIG, SIZES),
    "batch": ("batch_size", r"size|sizes|args|config|self|asked", r"(\w+\.)*(dict|estimate|compile_for|small|step_flops"
              r"|asked|Config|Finetune|SimpleNamespace|Namespace|replace)"),
    "clip": ("max_grad_norm", "config", r"(\w+\.)*(optimizer|Config|Finetune|dict|replace)"),
    "chunk": ("loss_chunk_size", "config", r"(\w+\.)*(loss_fn|Config|Finetune|dict|compile_for|estimate|counted_by)"),
    "targets": ("target_modules", "config|args", r"(\w+\.)*(inject|from_random|adapted|trained|Config|Finetune|dict)"),
    "seq": ("seq_len", "self|size|args", r"(\w+\.)*(dict|estimate|compile_for|small|step_flops)"),
    "change": ("lora_delta", r"self|layer", r"()"),
    "collect": ("output_hidden_states", r"()", r"(\w+\.)*model"),
}  # fmt: skip
# Keys of a batch, as constants: everywhere, or in the files where the word means this.
# Flags of the command line, in the pages' shell blocks too.
FLAGS = {
    "window": "max-seq-length", "batch": "batch-size", "accumulate": "gradient-accumulation-steps",
    "remat": "gradient-checkpointing", "no-remat": "no-gradient-checkpointing", "warmup": "warmup-steps",
    "clip": "max-grad-norm", "chunk": "loss-chunk-size", "targets": "target-modules", "seq": "seq-len",
}  # fmt: skip
KEYS = {"segments": ("segment_ids", r".*"), "weights": ("loss_mask", r"chapters/1[12]_|utils/(train|data/sft)\.py"
        r"|utils/commands/finetune\.py|tests/.*test_(sft|train|sharding|finetune)\.py|benchmarks/finetune\.py")}  # fmt: skip
FILES_WITH_CONFIG_KEYS = re.compile(
    r"tests/.*(test_transformer|test_minigpt|test_lora|tiny|test_train)\.py|assignment_[34]"
)
CONFIG_KEYS = {"width", "layers", "heads", "context", "architecture"}


def modules() -> dict[str, str]:
    """Old module name -> new dotted path."""
    found = {}
    for old, new in MOVES.items():
        if old != "utils/assets":
            found[Path(old).stem] = new.removesuffix(".py").replace("/", ".")
    return found


MODULES = modules()
STAY = ("checkpoints", "generate", "lora", "losses", "minigpt", "sharding", "train", "transformer")


class Rewriter:
    """The edits of one piece of Python. `bound` maps a local name to the old module that it stands for."""

    def __init__(self, source: str, path: str, bound: dict[str, str]):
        self.source, self.path, self.bound = source, path, bound
        self.edits: list[tuple[int, int, str]] = []
        self.needs: set[str] = set()  # new modules that the code refers to
        starts = [0]
        for line in source.split("\n"):
            starts.append(starts[-1] + len(line.encode()) + 1)
        self.starts, self.bytes = starts, source.encode()

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def edit(self, start: int, end: int, text: str) -> None:
        self.edits.append((start, end, text))

    def run(self) -> str:
        tree = ast.parse(self.source)
        self.parents = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }
        self.imports = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("utils")
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                self.attribute(node)
            elif isinstance(node, ast.Call):
                self.call(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.constant(node)
        for node in self.imports:
            self.importing(node)
        data = self.bytes
        for start, end, text in sorted(set(self.edits), reverse=True):
            data = data[:start] + text.encode() + data[end:]
        return data.decode()

    def attribute(self, node: ast.Attribute) -> None:
        end = self.at(node.end_lineno, node.end_col_offset)
        start = end - len(node.attr)
        base = node.value
        if isinstance(base, ast.Name) and base.id in self.bound:
            module = self.bound[base.id]
            target, name = NAMES.get(
                (module, node.attr), (MODULES.get(module, f"utils.{module}"), node.attr)
            )
            if (module, node.attr) == ("hub", "tokenizer") and self.own_tokenizer(node):
                target, name = "utils.data.tokenizer", "get"
            self.needs.add(target)
            begin = self.at(base.lineno, base.col_offset)
            local = target.split(".")[-1]
            if base.id != module:
                local = base.id if target == MODULES.get(module, f"utils.{module}") else local
            if target == "utils.commands.options":
                self.edit(begin, end, name)
            elif (local, name) != (base.id, node.attr):
                self.edit(begin, end, f"{local}.{name}")
            return
        receiver = ast.unparse(base)
        if node.attr in EVERYWHERE and not receiver.startswith(("np", "jnp")):
            self.edit(start, end, EVERYWHERE[node.attr])
        elif node.attr in SOMEWHERE and re.fullmatch(SOMEWHERE[node.attr][1], receiver):
            self.edit(start, end, SOMEWHERE[node.attr][0])

    def own_tokenizer(self, node) -> bool:
        call = self.parents.get(node)
        first = (
            call.args[0] if isinstance(call, ast.Call) and call.func is node and call.args else None
        )
        return isinstance(first, ast.Constant) and first.value in ("stories2048", "gpt2")

    def call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func)
        names = {k.arg for k in node.keywords}
        for keyword in node.keywords:
            name = keyword.arg
            if name is None:
                continue
            new = EVERYWHERE.get(name)
            if name in SOMEWHERE and re.fullmatch(SOMEWHERE[name][2], function):
                new = SOMEWHERE[name][0]
            if name == "targets" and "inputs" in names:
                new = None
            if name in ("chunk", "weights") and "chunked_cross" in function:
                new = {"chunk": "chunk_size", "weights": "loss_mask"}[name]
            if (
                name == "context"
                and function == "dict"
                and names & {"batch", "steps", "stories", "batch_size"}
            ):
                new = None  # a chapter's table of sizes: the length of its rows
            if new is not None:
                start = self.at(keyword.lineno, keyword.col_offset)
                self.edit(start, start + len(name), new)

    def constant(self, node: ast.Constant) -> None:
        value = node.value
        start, end = (
            self.at(node.lineno, node.col_offset),
            self.at(node.end_lineno, node.end_col_offset),
        )
        raw = self.bytes[start:end].decode()
        if value in KEYS and re.match(KEYS[value][1], self.path) and raw[1:-1] == value:
            self.edit(start + 1, end - 1, KEYS[value][0])
        elif (
            value in EVERYWHERE
            and raw[1:-1] == value
            and not isinstance(self.parents.get(node), ast.JoinedStr)
        ):
            self.edit(start + 1, end - 1, EVERYWHERE[value])
        elif (
            value in CONFIG_KEYS and raw[1:-1] == value and FILES_WITH_CONFIG_KEYS.search(self.path)
        ):
            self.edit(start + 1, end - 1, SOMEWHERE[value][0])
        elif (
            "\n" in value
            and raw.startswith('"""')
            and raw[3:-3] == value
            and not self.documents(node)
        ):
            bound, needs = collect([value])
            if (
                "wrong_answers" in self.path or "assignment_answers" in self.path
            ):  # runs with a chapter's imports
                bound = {module: module for module in (*MODULES, *STAY)} | bound
            try:
                new = rewrite_python(value, self.path, bound, needs)
            except SyntaxError:
                return
            if new != value:
                self.edit(start + 3, end - 3, new)

    def documents(self, node) -> bool:
        return isinstance(self.parents.get(node), ast.Expr)

    def importing(self, node: ast.ImportFrom) -> None:
        """`from utils import a, b` by the rooms, with what this code needs and no more."""
        start, end = (
            self.at(node.lineno, node.col_offset),
            self.at(node.end_lineno, node.end_col_offset),
        )
        indent = " " * node.col_offset
        if node.module != "utils":
            old = node.module.removeprefix("utils.").split(".")[0]
            rest = node.module.removeprefix(f"utils.{old}")
            groups: dict[str, list[str]] = {}
            for alias in node.names:
                default = (MODULES.get(old, f"utils.{old}") + rest, alias.name)
                target, name = NAMES.get((old, alias.name), default) if not rest else default
                words = name if not alias.asname else f"{name} as {alias.asname}"
                groups.setdefault(target, []).append(words)
            lines = [
                f"from {module} import {', '.join(sorted(names))}"
                for module, names in sorted(groups.items())
            ]
            if node.module in (
                "utils.data",
                "utils.hf",
                "utils.course",
                "utils.commands",
                "utils.evaluation",
            ) and old not in ("data",):
                return
            self.edit(start, end, f"\n{indent}".join(lines))
            return
        kept, groups = [], {}
        local = {alias.asname or alias.name: alias for alias in node.names}
        for alias in local.values():
            if alias.name in MODULES or alias.name in STAY:
                continue
            kept.append(alias.name if not alias.asname else f"{alias.name} as {alias.asname}")
        wanted = set(self.needs_of(local)) | {
            MODULES.get(alias.name, f"utils.{alias.name}")
            for name, alias in local.items()
            if (alias.name in MODULES or alias.name in STAY) and not self.used(name)
        }
        groups = {"utils": kept}
        for target in wanted:
            module, _, name = target.rpartition(".")
            if target == "utils.commands.options":
                module, name = (
                    target,
                    ", ".join(sorted(n for n in ("Finetune", "FREE") if self.mentions(n))),
                )
            asname = next(
                (
                    k
                    for k, a in local.items()
                    if a.asname and MODULES.get(a.name, f"utils.{a.name}") == target
                ),
                None,
            )
            groups.setdefault(module, []).append(f"{name} as {asname}" if asname else name)
        lines = [
            f"from {m} import {', '.join(sorted(names))}"
            for m, names in sorted(groups.items())
            if names
        ]
        self.edit(start, end, f"\n{indent}".join(lines) or "pass")

    def used(self, local: str) -> bool:
        return re.search(rf"(?<![\w.]){local}\.", self.whole) is not None

    def mentions(self, name: str) -> bool:
        return re.search(rf"\b{'Config' if name == 'Finetune' else name}\b", self.whole) is not None

    def needs_of(self, local) -> set[str]:
        """The new modules behind the names that this import bound, wherever in the file they are used."""
        return {target for name, target in self.file_needs if name in local}


def collect(pieces: list[str]) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """(local name -> old module, {(local name, new module)}) of all Python of a file."""
    bound: dict[str, str] = {}
    trees = []
    for piece in pieces:
        try:
            trees.append(ast.parse(piece))
        except SyntaxError:
            continue
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "utils":
                for alias in node.names:
                    if alias.name in MODULES or alias.name in STAY:
                        bound[alias.asname or alias.name] = alias.name
    needs = set()
    for tree in trees:
        calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in bound
            ):
                module = bound[node.value.id]
                target, _ = NAMES.get(
                    (module, node.attr), (MODULES.get(module, f"utils.{module}"), "")
                )
                call = calls.get(id(node))
                first = call.args[0] if call is not None and call.args else None
                own = isinstance(first, ast.Constant) and first.value in ("stories2048", "gpt2")
                if (module, node.attr) == ("hub", "tokenizer") and own:
                    target = "utils.data.tokenizer"
                needs.add((node.value.id, target))
    return bound, needs


BLOCK = re.compile(
    r"^(?P<fence>```+)(?P<kind>\{code-cell\}[^\n]*|python|py)\n(?P<body>.*?)^(?P=fence)[ \t]*$",
    re.S | re.M,
)


def split_head(body: str) -> tuple[str, str]:
    """A code cell's options (`:tags: [...]`, or a block between dashes), and its code."""
    if match := re.match(r"(---\n.*?^---\n|(?::[^\n]*\n)+)", body, re.S | re.M):
        return match[0], body[match.end() :]
    return "", body


def rewrite_python(source: str, path: str, bound=None, needs=None, whole: str | None = None) -> str:
    if bound is None:
        bound, needs = collect([source])
    rewriter = Rewriter(source, path, bound)
    rewriter.file_needs, rewriter.whole = needs, whole or source
    return rewriter.run()


def rewrite_markdown(text: str, path: str) -> str:
    pieces = [split_head(match["body"])[1] for match in BLOCK.finditer(text)]
    bound, needs = collect(pieces)
    whole = "\n".join(pieces)
    own = variables(pieces)

    def block(match: re.Match) -> str:
        head, code = split_head(match["body"])
        try:
            code = rewrite_python(code, path, bound, needs, whole)
        except SyntaxError:
            pass
        return f"{match['fence']}{match['kind']}\n{head}{code}{match['fence']}"

    parts, last = [], 0
    for match in BLOCK.finditer(text):
        parts += [backticks(text[last : match.start()], own), block(match)]
        last = match.end()
    text = "".join([*parts, backticks(text[last:], own)])
    return re.sub(
        rf"(?<![\w-])--({'|'.join(FLAGS)})(?![\w-])", lambda match: f"--{FLAGS[match[1]]}", text
    )


def variables(pieces: list[str]) -> set[str]:
    """Names of a page's own variables and parameters, which stay what they are."""
    found = set()
    for piece in pieces:
        try:
            tree = ast.parse(piece)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return found


def backticks(prose: str, own: set[str]) -> str:
    """Words in backticks: `module.name`, `name=...`, a field's name, a file of the package."""

    def words(match: re.Match) -> str:
        word = match[1]
        for (module, name), (target, new) in NAMES.items():
            word = re.sub(
                rf"(?<![\w./]){module}\.{name}\b(?!\.py)", f"{target.split('.')[-1]}.{new}", word
            )
        for old, new in MOVES.items():
            word = word.replace(old, new) if old in word and new not in word else word
        for old, new in MODULES.items():
            word = re.sub(rf"\butils\.{old}\b(?!\.py)", new, word) if f"{new}" not in word else word
            if old != new.split(".")[-1] and old not in ("data", "checks", "models", "mirror"):
                word = re.sub(
                    rf"(?<![\w./-]){old}\.(?=[a-z_]\w+\b)(?!(py|jsonl?|md)\b)",
                    f"{new.split('.')[-1]}.",
                    word,
                )
        for old, new in EVERYWHERE.items():
            if old not in own and re.fullmatch(rf"(config\.|batch\.|--)?{old}(=.*| .*)?", word):
                word = word.replace(old, new.replace("_", "-") if word.startswith("--") else new, 1)
        for old, (new, *_) in SOMEWHERE.items():
            if old not in own and re.fullmatch(rf"(config\.|--){old}( .*)?|{old}=.*", word):
                word = word.replace(old, new.replace("_", "-") if word.startswith("--") else new, 1)
        return f"`{word}`"

    return re.sub(r"(?<!`)`([^`\n]+)`(?!`)", words, prose)


def keep_outputs() -> None:
    """Carry each chapter's recorded outputs over to its renamed cells, by position; the record says that this was done.

    `make execute` makes them anew, and a record without the mark.
    """
    sys.path.insert(0, str(ROOT))
    from tools import pairs, sync

    for stem in pairs.chapters(ROOT):
        sync.sync_pair(
            stem, pairs.settings(ROOT)
        )  # ids and outputs of the cells that did not change
        path = stem.with_suffix(".ipynb")
        text = subprocess.run(
            ["git", "show", f"HEAD:{path.relative_to(ROOT)}"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        old, new = pairs.nbformat.reads(text.stdout.decode(), as_version=4), pairs.read_ipynb(path)
        before, after = (
            [cell for cell in nb.cells if cell.cell_type == "code"] for nb in (old, new)
        )
        record = new.metadata["course"]["provenance"]
        if len(before) != len(after) or pairs.code_hash(new) == record["code"]:
            continue
        for was, cell in zip(before, after):
            cell.outputs, cell.execution_count = was.outputs, was.execution_count
        record["renamed"] = pairs.code_hash(new)
        pairs.write_ipynb(path, new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="list what would change")
    parser.add_argument(
        "--keep-outputs", action="store_true", help="carry recorded outputs over to renamed cells"
    )
    arguments = parser.parse_args()
    if arguments.keep_outputs:
        keep_outputs()
        return 0
    check = arguments.check
    for old, new in MOVES.items():
        if not (ROOT / old).exists() or (old == "utils/data.py" and not (ROOT / old).is_file()):
            continue
        print(f"move    {old} -> {new}")
        if not check:
            (ROOT / new).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["git", "mv", "-k", old, new], cwd=ROOT, check=True)
    for pattern in TEXTS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.name == OWN or ".venv" in path.parts or not path.is_file():
                continue
            old = path.read_text()
            try:
                new = (
                    rewrite_python(old, name)
                    if path.suffix == ".py"
                    else rewrite_markdown(old, name)
                )
            except SyntaxError as error:
                print(f"skipped {name}: {error}", file=sys.stderr)
                continue
            if new != old:
                print(f"rewrite {name}")
                if not check:
                    path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
