"""What a run leaves on the disk: its model, its log, and all it needs to go on after a stop.

    out/<name>.pt                the model; replaced when there is a whole new one
    out/<name>/metrics.jsonl     a line a step, for the figures
    out/<name>/settings.json     its flags
    out/<name>/state.pt          for --resume; while the run lasts it holds weights, optimizers,
                                 generators of random numbers and the log, afterwards "finished"

A run is killed at any moment, --resume goes on from the last state, and on a CPU what comes out is
the same to the bit. Nothing here knows what is trained.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile

import torch
from tqdm import tqdm

from data.formats import UserError, fingerprint, get_tokenizer, lock, replacing
from model import GPT, GPTConfig, ScalarModel
from parallel import RANK, gather

BROKEN = (
    AttributeError, BadZipFile, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # what reading a file that is not what it should be raises, one time or another


def checkpoint(cfg, name: str) -> Path:
    """A run's name means its checkpoint in --out; a name that ends in .pt is a path already."""
    return Path(name) if name.endswith(".pt") else Path(cfg.out) / f"{name}.pt"


def save(cfg, model: GPT | ScalarModel) -> None:
    """One file of plain types and tensors, in the place of the last one once it is whole."""
    content = {"kind": type(model).__name__, "config": vars(model.config)}
    if RANK == 0:
        write_tensors(checkpoint(cfg, cfg.name), content | {"model": model.state_dict()})


def write_tensors(path: Path, content: dict) -> None:
    """All of it or none, in the place of what was there."""
    with replacing(path) as file:
        torch.save(content, file)


def read_tensors(path: Path) -> dict:
    """What write_tensors wrote; UserError if it is cut off, or could run code when it is read."""
    try:
        check_zip(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True).items())
    except UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain values: not read") from None
    except BROKEN as error:
        raise UserError(f"{path} is not a whole checkpoint: {one_line(error)}") from None


def check_zip(path: Path) -> None:
    """BadZipFile if a bit of it has turned: torch does not compare the checksums that it writes,
    and leaves the memory as it is of a tensor whose attributes say that it is a folder."""
    with ZipFile(path) as file:
        entries = file.infolist()
        once = len({entry.filename for entry in entries}) == len(entries)
        plain = not any(entry.external_attr or entry.compress_type for entry in entries)
        if not (once and plain) or file.testzip():
            raise BadZipFile("it is garbled")


def one_line(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:200]


def load(cfg, name: str, kind: type = GPT, dropout: float = 0.0) -> GPT | ScalarModel:
    """A checkpoint's model, in eval mode. UserError if it is missing, broken, of another kind, or
    knows other tokens than the data does (--data "": nobody asks)."""
    path = checkpoint(cfg, name)
    if not path.exists():
        raise UserError(f"{path} is not there: run the stage that writes it first")
    content = read_tensors(path)
    try:
        if content["kind"] != kind.__name__:
            raise UserError(f"{path} holds a {content['kind']}, where a {kind.__name__} is needed")
        config = GPTConfig(**{**content["config"], "dropout": dropout})
        if config.n_layer > len(content["model"]):
            raise ValueError(f"no {config.n_layer} layers in it")
        with torch.device("meta"):  # shapes alone: no memory until the file is known to fit
            model = kind(config)
        model.load_state_dict(content["model"], assign=True)
    except BROKEN as error:
        raise UserError(f"{path} is not a checkpoint of this program: {one_line(error)}") from None
    if cfg.data:
        check_vocabulary(path, config, cfg.data)
    return model.float().to(cfg.device).eval()


def check_vocabulary(path: Path, config: GPTConfig, data: str) -> None:
    """A model reads the very tokens it was trained on; of GPT-2's only their number is known."""
    tokenizer = get_tokenizer(data)
    own = fingerprint(tokenizer)
    if (config.vocab_size, config.vocabulary or own) != (tokenizer.n_vocab, own):
        raise UserError(f"{path} was trained on another vocabulary than that of --data {data}")


class Log:
    """A bar for the person, a line a step for the figures, and the state of the run.

        with Log(cfg, total, memory, rng, parts) as log:  # parts: models and optimizers
            for step in range(len(log.rows), total):
                log.step({"loss": ...})
        log.finish(model)

    The state is kept every `save_minutes`, and after the step in which Ctrl-C or SIGTERM came; the
    second Ctrl-C does not wait. UserError if another run is at work in the folder, or was begun
    with other settings; a UserError from within gets the number of its step.
    """
    def __init__(self, cfg, total: int, memory: float, rng, parts: list):
        self.cfg, self.rng, self.parts, self.rows, self.asked = cfg, rng, parts, [], False
        self.folder = Path(cfg.out) / cfg.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(os.devnull if RANK else self.folder / "metrics.jsonl", "a")
        if RANK == 0 and not lock(self.file):
            raise UserError(f"another run is at work in {self.folder}")
        self.begin()
        print(f"{cfg.name}: {cfg.device}, {cfg.dtype}, about {memory:.1f} GiB of memory")
        self.bar = tqdm(total=total, desc=cfg.name, mininterval=1, disable=RANK > 0)
        self.bar.update(len(self.rows))
        self.kept = time.time()
        self.start = self.kept - (self.rows[-1]["seconds"] if self.rows else 0)

    def begin(self) -> None:
        """A new run, unless --resume finds the rest of one."""
        settings = vars(self.cfg) | {"processes": len(gather(None))}
        decisive = settings.keys() - {"out", "resume", "save_minutes"}
        self.settings = {name: settings[name] for name in sorted(decisive)}
        path, state = self.folder / "state.pt", {}
        if self.cfg.resume and path.exists():
            state = read_tensors(path)
        before = state.get("settings", {})
        if changed := [f"--{x} {y}" for x, y in before.items() if y != self.settings.get(x)]:
            raise UserError(f"{path} is of a run with other settings: {', '.join(changed)}")
        if "finished" in state and checkpoint(self.cfg, self.cfg.name).exists():
            print(f"{self.cfg.name}: finished already")
            sys.exit()
        if "parts" in state:
            self.restore(state)
        if RANK > 0:
            return
        if "parts" not in state:
            self.write({})
        self.file.truncate(0)
        self.file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.file.flush()
        (self.folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")

    def generators(self) -> list:
        """Torch's sources of random numbers: the CPU's, and the device's."""
        return [torch] if self.cfg.device == "cpu" else [torch, getattr(torch, self.cfg.device)]

    def restore(self, state: dict) -> None:
        for part, content in zip(self.parts, state["parts"]):
            part.load_state_dict(content)
        for generator, content in zip(self.generators(), state["torch"][RANK]):
            generator.set_rng_state(content)
        self.rng.bit_generator.state = state["numpy"]
        random.setstate(state["python"])
        self.rows = state["rows"]

    def keep(self) -> None:
        """Write all that the rest of the run depends on."""
        state = {
            "rows": self.rows,
            "parts": [part.state_dict() for part in self.parts],
            "torch": gather([generator.get_rng_state() for generator in self.generators()]),
            "numpy": self.rng.bit_generator.state,
            "python": random.getstate(),
        }
        self.write(state)
        self.kept = time.time()

    def write(self, state: dict) -> None:
        if RANK == 0:
            write_tensors(self.folder / "state.pt", {"settings": self.settings, **state})

    def __enter__(self) -> "Log":
        signals = signal.SIGINT, signal.SIGTERM
        self.handlers = {number: signal.signal(number, self.ask) for number in signals}
        return self

    def ask(self, *_) -> None:
        """Stop once the step is done; asked again, at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step")

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error:
            self.file.close()  # and with it the lock
        if isinstance(error, UserError):
            raise UserError(f"step {len(self.rows) + 1}: {error}") from None

    def step(self, metrics: dict[str, float], *show: str) -> None:
        """Log a step; keep the state if it is time; stop if that was asked for."""
        self.bar.set_postfix({key: f"{metrics[key]:.3g}" for key in show}, refresh=False)
        self.bar.update()
        self.line(metrics)
        due = time.time() - self.kept >= 60 * self.cfg.save_minutes
        due, asked = map(any, zip(*gather((due, self.asked))))  # all processes or none
        if due or asked:
            self.keep()
        if asked:
            raise KeyboardInterrupt(f"after step {len(self.rows)}, --resume goes on from there")

    def line(self, metrics: dict[str, float]) -> None:
        seconds = round(time.time() - self.start, 2)
        row = json.dumps({"step": len(self.rows) + 1, "seconds": seconds, **metrics})
        self.rows.append(json.loads(row))
        print(row, file=self.file, flush=True)

    def finish(self, model: GPT | ScalarModel | None = None) -> None:
        """Save the model, unless that is done, and leave nothing to resume."""
        if model is not None:
            save(self.cfg, model)
        self.write({"finished": True})
        self.file.close()
