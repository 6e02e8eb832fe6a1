"""Plant faults in the library, one line at a time, and count those that the contract suite notices.

    python tests/mutate.py [words of mutants to run]

Each mutant is a line of metazo replaced in a copy of the checkout, on which the contract suite runs for the methods that
use the line; faults that survive are tried against all tests of the mutant's room (by default, the optimizers). Prints a
table; about fifteen minutes. Exits with an error if a fault survives, or cannot be planted because its text is no longer in the file.
"""

# ruff: noqa: E501 (one mutant, one line)
from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numba  # noqa: F401 (imported once, here, for every forked run)
import pytest
import torch
from safetensors import torch as _  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

ROOT = Path(__file__).parents[1]
CONTRACT = [f"tests/optimizers/test_contract{part}.py" for part in ("_descent", "", "_state")]
LIMIT = 400  # seconds per run


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    old: str
    new: str
    methods: str = "mezo"
    room: str = "tests/optimizers"


MUTANTS = [
    Mutant("sign of the update", "step/weights.py", "[-rate(tensor) * term.amount", "[rate(tensor) * term.amount"),
    Mutant("sign of one probe", "step/estimators.py", "for sign in (1.0, -1.0)", "for sign in (1.0, 1.0)"),
    Mutant("probes in the other order", "step/estimators.py", "for sign in (1.0, -1.0)", "for sign in (-1.0, 1.0)"),
    Mutant("another seed in the update", "step/terms.py", "[Term(None, seed, c) for", "[Term(None, seed + 1, c) for",
           "mezo,lozo,hizoo,fzoo,loren"),
    Mutant("another seed in one probe", "optimizers/verbs.py", "seeds[probe.query], probe", "seeds[probe.query] + (probe.multiple < 0), probe"),
    Mutant("no division by the queries", "step/estimators.py", "(2 * eps) / self.queries", "(2 * eps)"),
    Mutant("no division by 2 eps", "step/estimators.py", "(plus - minus) / (2 * eps)", "(plus - minus)"),
    Mutant("probe not taken off by the update", "step/weights.py", "amounts[k] - factor * removed[k]", "amounts[k]"),
    Mutant("probe not taken off without an update", "step/weights.py", "amount=-term.amount)", "amount=0.0)"),
    Mutant("probe left on after an exception", "optimizers/base.py",
           "        except BaseException:\n            self.weights.leave()\n            raise\n",
           "        except BaseException:\n            raise\n"),
    Mutant("a waiting update is lost", "step/weights.py", "            waiting.apply()\n", "            pass\n"),
    Mutant("a waiting update is lost to the next probe", "step/weights.py", "waiting.apply_with(following)", "following.apply()"),
    Mutant("decay of a probe forgotten", "step/weights.py", "factor * removed[k]", "removed[k]"),
    Mutant("masters: the update does not reach the weights", "step/weights.py", "for name in masters:", "for name in ():"),
    Mutant("masters: the update takes off a probe that is not there", "step/weights.py", "removed = folded if isinstance", "removed = folded if not isinstance"),
    Mutant("masters not read", "step/precision.py", "return self.buffers[\"master\"]", "return self.param.data"),
    Mutant("no masters for narrow weights", "step/precision.py", 'bfloat16: "master"', 'bfloat16: "in-place"'),
    Mutant("masters not saved", "optimizers/saving.py", "return self.zo_state | kept |", "return self.zo_state |"),
    Mutant("weights not settled on masters", "step/precision.py", "        self.param.data.copy_(self.theta)", "        pass"),
    Mutant("not finite is not noticed", "optimizers/base.py", "finite = all(math.isfinite(loss) and abs(loss) <= self.max_loss for loss in losses)", "finite = True"),
    Mutant("step not counted", "optimizers/base.py", "self.steps += 1", "self.steps += 0"),
    Mutant("step not restored", "optimizers/saving.py", 'self.steps, self.forwards = (int(n) for n in state["counters"])', "pass"),
    Mutant("state not restored", "optimizers/saving.py", "value.copy_(self._converted(name, state[name], value.dtype))", "pass", "mezo-momentum"),
    Mutant("record's learning rate ignored", "optimizers/base.py", "replay.lr if replay else ", ""),
    Mutant("losses not shared", "optimizers/base.py", "return self.exchange.combined(losses) if", "return losses if"),
    Mutant("losses summed over processes", "optimizers/ranks.py", "[value / shares for", "[value for"),
    Mutant("probe of another process", "optimizers/ranks.py", "% self.probe_ranks == 0", "% self.probe_ranks == 1"),
    Mutant("stop of one process is not heard", "optimizers/ranks.py", "self.stopped = stops > 0", "self.stopped = stops > 1"),
    Mutant("a shard gets the noise of the first rows", "blocks.py", "found[firsts]", "found[firsts] - found[0]", room="tests/noise/test_shards.py"),
    Mutant("a shard's spans are those of rows", "blocks.py", "if len(found) < whole[k]]", "if False]", room="tests/noise/test_shards.py"),
    Mutant("a span's first words are those of the span before it", "noise/cpu_shards.py", "fresh = done == here[span] or chunk % 8 == 0", "fresh = chunk % 8 == 0", room="tests/noise/test_shards.py"),
    Mutant("numbers of the span before are used again", "noise/cpu_shards.py", "if chunk != made:", "if made < 0:", room="tests/noise/test_shards.py"),
    Mutant("a shard is given to what needs whole tensors", "noise/stream.py", "    if tensor.spans is not None:\n        raise", "    if False:\n        raise", room="tests/noise/test_shards.py"),
    Mutant("a state of other shards is loaded", "optimizers/saving.py", 'present["shards"] != state', 'False and state', room="tests/integrations/test_tensor_parallel.py"),
    Mutant("a tensor without entries is trained", "blocks.py", "is_lazy(param) or param.numel()", "True"),
    Mutant("moves of others left out", "optimizers/base.py", "self.weights.in_place or index", "index"),
    Mutant("last move left out", "optimizers/base.py", " or index == len(probes) - 1", ""),
    Mutant("closures summed", "optimizers/verbs.py", "for evaluate in closures) / len(closures)", "for evaluate in closures)"),
    Mutant("frozen trained", "blocks.py", "if in_training(param) and id(param) not in seen", "if id(param) not in seen"),
    Mutant("tied counted twice", "optimizers/groups.py", "            if id(param) not in seen:\n", "            if True:\n"),
    Mutant("one learning rate for all groups", "optimizers/base.py", "lambda tensor: learning_rates[tensor.group]",
           "lambda tensor: learning_rates[0]"),
    Mutant("decay of biases", "optimizers/verbs.py", "or not any(part in tensor.name", "or True or not any(part in tensor.name"),
    Mutant("a failure after the probes leaves one on", "optimizers/base.py",
           "exchanged again\n                self.weights.leave()", "exchanged again\n                pass"),
    Mutant("slices that overlap are not seen", "optimizers/guards.py", "        own.fill_(number)\n", "        own.fill_(0)\n"),
    Mutant("a group's own decay is ignored", "optimizers/verbs.py", "return own or not", "return not",
           room="tests/optimizers/test_guards.py"),
    Mutant("a record that failed is computed again", "optimizers/base.py", "if self._unrecorded is not None:\n            if replay",
           "if False:\n            if replay",
           "lozo-m"),
    Mutant("probes evaluated together miss the last update", "step/weights.py", 'applied here.\n        """\n        self.settle()',
           'applied here.\n        """', room="tests/step/test_pending.py"),
    Mutant("a trained input is not probed", "step/batched.py", "None if id(input) in mode.tensors else mode.factors(weight)\n    if factors is None:",
           "mode.factors(weight)\n    if factors is None:", room="tests/step/test_batched.py"),
    Mutant("options: a node sees every other", "tasks/options.py", 'sees[:, length:, length:] = batch["node_sees"]',
           "sees[:, length:, length:] = True", room="tests/tasks/test_options.py"),
    Mutant("options: no position behind the prompt", "tasks/options.py", 'positions[:, -1:] + batch["node_depths"]',
           'positions[:, -1:] + 0 * batch["node_depths"]', room="tests/tasks/test_options.py"),
    Mutant("options: windows are ignored", "tasks/options.py", "window is None or length <= window", "True",
           room="tests/tasks/test_options.py"),
    Mutant("svrg: mini rate over the default's", "optimizers/svrg.py", 'group.get("own_lr", group.get("initial_lr", before))', "before",
           room="tests/optimizers/test_svrg.py"),
    Mutant("no decay", "optimizers/base.py", "factors = {name: 1 - decay for", "factors = {name: 1.0 for"),
    Mutant("momentum: sign", "step/rules.py", "sub_(buffer, alpha=lr)", "add_(buffer, alpha=lr)", "mezo-momentum"),
    Mutant("momentum: no memory", "step/rules.py", "add(buffer, 1.0, self.momentum)", "add(buffer, 1.0, 0.0)", "mezo-momentum"),
    Mutant("adam: sign", "step/rules.py", "value=-lr / (1", "value=lr / (1", "mezo-adam"),
    Mutant("adam: no bias correction", "step/rules.py", "torch.div(v, 1 - second**count", "torch.div(v, 1.0", "mezo-adam"),
    Mutant("rms: probe unscaled", "step/directions.py", "out, alpha * self.scales[tensor.name], beta, start)", "out, alpha, beta, start)",
           "mezo,zo-finetuner"),
    Mutant("scale: update unscaled", "step/terms.py", "if self.scales is None or", "if True or",
           "curvzo,lozo-m"),
    Mutant("scale: losses not observed", "optimizers/base.py", "self.scale.observe(self.zo_state,", "(lambda *a: None)(self.zo_state,",
           "zo-finetuner"),
    Mutant("loren: other root", "step/directions.py", "alpha=-factor)", "alpha=factor)", "loren"),
    Mutant("loren: no baseline", "step/estimators.py", "(f - centre) / (eps * (self", "f / (eps * (self", "loren"),
    Mutant("loren: sign of f", "step/estimators.py", "(f - centre) / (eps * (self", "(centre - f) / (eps * (self", "loren"),
    Mutant("loren: sign of a's step", "optimizers/loren.py", "a.sub_(total, alpha=self.lr_cov)", "a.add_(total, alpha=self.lr_cov)",
           "loren"),
    Mutant("loren: probe with a, update with the new a", "optimizers/loren.py", 'state[name].clone() for', 'state[name] for', "loren"),
    Mutant("loren: a of the wrong score", "optimizers/loren.py", "(d.t() @ (d @ a)) / damping", "(d.t() @ (d @ a))", "loren"),
    Mutant("curvzo: weights pi, not 1 / pi", "optimizers/curvzo.py", "tensor.name: 1 / p for", "tensor.name: p for", "curvzo"),
    Mutant("curvzo: update everywhere", "optimizers/curvzo.py", "Scaled(self.sparse(state), weights)", "Scaled(Isotropic(), weights)",
           "curvzo"),
    Mutant("curvzo: mask drawn again", "optimizers/curvzo.py", "self.noise.uniform(step, len(self.tensors))",
           "__import__('numpy').random.rand(len(self.tensors))", "curvzo"),
    Mutant("curvzo: scores not learned", "optimizers/curvzo.py", "self.learn(state, seeds[0], c)", "pass", "curvzo"),
    Mutant("curvzo: weight forgets that none is excluded", "optimizers/curvzo.py", "pi / (1 - np.prod(1 - pi))", "pi", "curvzo"),
    Mutant("fzoo: sign", "step/estimators.py", "(f - losses[0]) / (eps", "(losses[0] - f) / (eps", "fzoo"),
    Mutant("fzoo: no spread", "optimizers/fzoo.py", "[c / spread for", "[c for", "fzoo"),
    Mutant("dominant-layer: all layers", "optimizers/dominant_layer.py", "if pair[0] in kept", "if True", "dominant-layer"),
    Mutant("lozo: V new at each draw", "optimizers/lozo.py", "if step % self.interval == 0:", "if True:", "lozo"),
    Mutant("lozo-m: no momentum kept", "optimizers/lozo.py", "(self.momentum, 1 - self.momentum)", "(0.0, 1.0)", "lozo-m"),
    Mutant("lozo: V is kept for good", "optimizers/lozo.py", "if step % self.interval == 0:", "if step == 0:", "lozo"),
    Mutant("lozo: no projection of the momentum", "optimizers/lozo.py", "momentum @ (present.t() @ right)", "momentum * 1.0", "lozo-m"),
    Mutant("a sum of terms: its second is not probed", "step/weights.py", "        for change in changes if", "        for change in changes[:1] if"),
    Mutant("a sum of terms: its second is left on", "step/weights.py", "        if applied or self.at_snapshot:", "        if self.at_snapshot:"),
    Mutant("rule: the length of the step is ignored", "optimizers/base.py", "term.seed, factor * term.amount)", "term.seed, term.amount)", "meazo"),
    Mutant("branches: one U for all queries", "step/batched.py", "each[0] if self.query is None else", "each[0] if True else", "lozo"),
    Mutant("hizoo: probe left on along the new H", "optimizers/hizoo.py",
           "        self.weights.leave()  # the probe", "        # the probe", "hizoo"),
    Mutant("hizoo: H not learned", "optimizers/hizoo.py", "            self.absorb(", "            (lambda *a: 0)(", "hizoo"),
    Mutant("svrg: gbar added with the other sign", "optimizers/svrg.py", 'float(state["svrg/full"]))', '-float(state["svrg/full"]))',
           "mezo-svrg"),
    Mutant("svrg: control variate added", "step/estimators.py", "- (losses[0] - losses[1])) / (2 * eps)",
           "+ (losses[0] - losses[1])) / (2 * eps)", "mezo-svrg"),
]  # fmt: skip


def _pytest(folder: Path, tests: list[str], methods: str | None) -> None:
    """In a forked process: the tests on the copy, output to a file."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)  # for the processes that the tests start
    if methods:
        os.environ["METAZO_CONTRACT_METHODS"] = methods
    with open(folder / "out", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *tests])
    os._exit(int(code))


def run(folder: Path, tests: list[str], methods: str | None) -> str | None:
    """First failing test, or None."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests, methods))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return "time limit"
    if process.exitcode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S*?(?:::(\S+)|(\S+))", (folder / "out").read_text(), re.M)
    return (found.group(1) or found.group(2)) if found else f"exit {process.exitcode}"


def stale(mutants: Sequence[Mutant] = MUTANTS) -> list[str]:
    """Faults that cannot be planted: their text is no longer in the file, or they change nothing."""
    return [
        f"{mutant.what}: {mutant.old!r} is not in {mutant.file}"
        for mutant in mutants
        if mutant.old == mutant.new or mutant.old not in (ROOT / "metazo" / mutant.file).read_text()
    ]


def main(words: list[str]) -> None:
    if gone := stale():
        sys.exit("Faults that can no longer be planted:\n" + "\n".join(gone))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("metazo", "cli", "tests", "benchmarks", "examples"):  # some tests read what is beside the library
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.what for word in words)]
        rooms = sorted({mutant.room for mutant in chosen})
        if failing := run(folder, [*CONTRACT, *rooms], None):
            sys.exit(f"{failing} fails on the library as it is: what it says of mutants would mean nothing")
        counts = {"contract": 0, "other tests": 0, "survived": 0}
        for mutant in chosen:
            path = folder / "metazo" / mutant.file
            text = path.read_text()
            path.write_text(text.replace(mutant.old, mutant.new))
            killer, by = run(folder, CONTRACT, mutant.methods), "contract"
            if killer is None:
                killer, by = run(folder, [*CONTRACT, mutant.room], None), "other tests"
            path.write_text(text)
            counts[by if killer else "survived"] += 1
            print(f"| {mutant.what} | {by if killer else 'SURVIVED'} | {killer or ''} |", flush=True)
        print(counts)
        if counts["survived"]:
            sys.exit(f"{counts['survived']} planted faults were not noticed")


if __name__ == "__main__":
    main(sys.argv[1:])
