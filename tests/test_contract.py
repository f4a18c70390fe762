"""Level 3: every method keeps the contract of `semiseg.testing`, and a method that breaks it is found out."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from needs import needed
from together import Forked

from semiseg import testing
from semiseg.methods import METHODS
from semiseg.testing import Case, Move

# What the tests need to know about a method beyond its name. A new method starts without an entry.
MOVES: Mapping[str, Mapping[str, Sequence[Move]]] = {
    "fixmatch": {
        "threshold_decay": (Move(0.0, {"adaptive": True}),),
    },
    "advsemiseg": {
        "lambda_adv": (Move(0.0), Move(0.5)),
        "lambda_adv_unlabelled": (Move(0.0), Move(0.5)),
        "lambda_semi": (Move(0.0), Move(0.5)),
        "threshold": (Move(1.0),),
        "adv_start": (Move(0.5),),
        "semi_start": (Move(0.0), Move(0.5)),
        "critic_scale": (Move(2.0),),
        "real_smoothing": (Move(0.1),),
    },
    "u2pl": {
        "auxiliary": (Move(0.4), Move(0.8, {"auxiliary": 0.4})),
        "warm_up": (Move(0.0), Move(0.5)),
        "least": (Move(0.3),),
        "rank_low": (Move(2),),
        "rank_high": (Move(2),),
    },
    "selftraining": {
        "teacher_network": (Move({"name": "fpn", "encoder": "test_resnet", "weights": "random"}),),
        "least": (Move(0.6),),
        "top": (Move(2),),
        "ratio": (Move(1.0),),
        "tile": (Move([8, 8]),),
        "least_pixels": (Move(300),),
        "scales": (Move([0.5, 1.0]),),
    },
    "st++": {"snapshots": (Move(2),)},
    "transfer": {
        "least": (Move(0.6),),
        "least_new": (Move(0.6),),
        "doubt": (Move(0.3),),
        "shares": (Move([1.0, 2.0, 1.0]), Move([0.0, 1.0, 1.0])),
        "tile": (Move([8, 8]),),
        "least_pixels": (Move(300),),
        "scales": (Move([0.5, 1.0]),),
    },
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "u2pl": {"least": 0.0, "width": 16, "queue": 100, "queue_first": 150, "push": 40, "anchors": 64, "keys": 20},
    "selftraining": {"least_pixels": 8},
    "transfer": {"least_pixels": 8},
}
"""What would sleep in so short a run: no class but one has anchors, and no queue is full."""
SELECTING: Mapping[str, tuple[Mapping[str, Any], Sequence[str]]] = {
    "fixmatch": ({"threshold": 0.4147}, ["confident"]),
    "advsemiseg": ({"threshold": 0.499318, "semi_start": 0.0}, ["selected"]),
    "cutmixseg": ({"threshold": 0.4147}, ["confident"]),
    "unimatch": ({"threshold": 0.4147}, ["confident"]),
    "unimatchv2": ({"threshold": 0.4147}, ["confident"]),
    "u2pl": ({"weight": 0.0}, ["reliable"]),  # anchors and keys are drawn by each process: see test_processes.py
}
"""More options, by which some pixels are selected from the first steps on, and the scalar that tells their share."""
NO_RUN = "there is no other run here: see test_transfer.py"
IDLE: Mapping[str, Mapping[str, str]] = {
    "fixmatch": {"class_wise": "one class alone is predicted in so short a run: see test_methods.py"},
    "selftraining": {"teacher": NO_RUN},
    "transfer": {"teacher": NO_RUN, "source": "other data: see test_transfer.py", "classes": "the same"},
}
WITHOUT_UNLABELLED = {"supervised"}

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(testing, "_launch", Forked)  # as it is in test_docs.py


def case_of(method: str, folder: Path) -> Case:
    return Case(method, folder, {**(OPTIONS[method] if method in OPTIONS else {}), **needed(method, folder)})


@every_method
@pytest.mark.parametrize(
    "check",
    [
        testing.check_resume,
        testing.check_workers,
        testing.check_seed,
        testing.check_observers,
        testing.check_gradients,
        testing.check_ignored,
        testing.check_masks,
    ],
    ids=lambda check: check.__name__,
)
def test_contract(method: str, check: Callable[[Case], None], tmp_path: Path) -> None:
    check(case_of(method, tmp_path))


@every_method
def test_two_processes_end_like_one(method: str, tmp_path: Path) -> None:
    options, shares = SELECTING[method] if method in SELECTING else ({}, ())
    testing.check_processes(case_of(method, tmp_path).with_options(options), shares)


@pytest.mark.parametrize("check", [testing.check_resume, testing.check_processes], ids=lambda check: check.__name__)
def test_thresholds_that_follow_the_teacher(check: Callable[[Case], None], tmp_path: Path) -> None:
    """They are state of a run, and those of all processes together."""
    options = {"adaptive": True, "class_wise": True, "threshold_decay": 0.9}
    check(case_of("fixmatch", tmp_path).with_options(options))


@every_method
def test_unlabelled_images_matter(method: str, tmp_path: Path) -> None:
    testing.check_unlabelled(case_of(method, tmp_path), used=method not in WITHOUT_UNLABELLED)


@every_method
def test_pools_smaller_than_a_batch(method: str, tmp_path: Path) -> None:
    """One labelled image, and fewer unlabelled images than labelled ones: two, which ST++ halves."""
    case = case_of(method, tmp_path)
    data = case.data()
    for name, labelled, unlabelled in (("one-labelled", 1, 6), ("two-unlabelled", 4, 2)):
        few = replace(data, labelled=data.labelled[:labelled], unlabelled=data.unlabelled[:unlabelled])
        found = testing.run(case, name, data=few, steps=2, batch=8)
        assert all(tensor.isfinite().all() for tensor in found.net.values() if tensor.is_floating_point())


LOSS = ("loss.class_weights", "loss.ohem_threshold", "loss.ohem_kept", "loss.dice_weight")


@every_method
def test_every_option_is_alive(method: str, tmp_path: Path) -> None:
    moves = MOVES[method] if method in MOVES else None
    idle = IDLE[method] if method in IDLE else {}
    if method != "supervised":  # which shows that they are alive; that they arrive here is shown by loss.kind
        idle = idle | dict.fromkeys(LOSS, "of the labelled loss, which all methods share")
    testing.check_options(case_of(method, tmp_path), moves, idle)


# ---- methods of an outsider ------------------------------------------------------------------------------------------

TINY = """
import random
from pathlib import Path

import torch
from torch import nn

from semiseg.data.sampling import Phase, Stream
from semiseg.methods import Method, StepMethod, Supervised
from semiseg.ops.ema import ema_update, make_teacher
from semiseg.ops.losses import cross_entropy, masked_cross_entropy
from semiseg.ops.pseudo import pseudo_label
from semiseg.types import IGNORE, Options, Share


class Net(nn.Sequential):
    def __init__(self, channels, classes):
        first = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)
        super().__init__(*first, nn.Conv2d(8, classes, 1))


class Config(Options):
    weight: float = 0.5
    kind: str = "plain"


class Good(StepMethod):
    Config = Config
    paper = "none"

    def __init__(self, config, build):
        super().__init__()
        self.config, self.build = config, build
        self.student = build.network()
        self.teacher = make_teacher(self.student)
        self.optimizers = {"student": build.optimizer(self.student)}
        self.register_buffer("seen", torch.zeros(()))

    def streams(self, data, batch, crop):
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong=1)}

    def step(self, clock, labelled, unlabelled):
        with torch.no_grad():
            label, confidence = pseudo_label(self.teacher(unlabelled.image))
        logits = self.student(unlabelled.image)
        terms = [(1.0, cross_entropy(self.student(labelled.image), labelled.mask)),
                 (self.config.weight, masked_cross_entropy(logits, label, confidence > 0.2, unlabelled.valid))]
        values = self.update("student", *self.changed(terms, clock, labelled, unlabelled))
        self.seen += 1
        self.after(clock)
        return {"loss": values[0], "loss_unlabelled": values[1]}

    def changed(self, terms, clock, labelled, unlabelled):
        return terms

    def after(self, clock):
        ema_update(self.teacher, self.student, clock.step, 0.9)

    def predictor(self):
        return self.teacher
"""

HIDDEN_STATE = """
class Sinner(Good):
    steps = 0

    def changed(self, terms, clock, labelled, unlabelled):
        self.steps += 1
        return [(1.0 + self.steps, terms[0][1]), terms[1]]
"""

CARELESS_OF_DISK = """
class Sinner(Good):
    def streams(self, data, batch, crop):
        self.note = Path(data.config.root).parent / "note"
        return super().streams(data, batch, crop)

    def changed(self, terms, clock, labelled, unlabelled):
        with self.note.open("a") as file:
            file.write("x")
        return [(1.0 + self.note.stat().st_size, terms[0][1]), terms[1]]
"""

PROCESS_STATE = """
class Sinner(Good):
    def changed(self, terms, clock, labelled, unlabelled):
        return [(random.random(), terms[0][1]), terms[1]]
"""

DEAF_TO_THE_SEED = """
class Sinner(Good):
    def __init__(self, config, build):
        super().__init__(config, build)
        nn.init.constant_(self.student.model[0].weight, 0.1)
        nn.init.constant_(self.student.model[4].weight, 0.1)
        nn.init.constant_(self.student.model[0].bias, 0.1)
        nn.init.constant_(self.student.model[4].bias, 0.1)
        self.teacher.load_state_dict(self.student.state_dict())

    def step(self, clock, labelled, unlabelled):
        torch.manual_seed(0)
        for batch in (labelled, unlabelled):
            batch.image.fill_(1)
            batch.valid.fill_(True)
        labelled.mask.fill_(1)
        return super().step(clock, labelled, unlabelled)
"""

MOVED_BY_EVALUATION = """
class Sinner(Good):
    def predictor(self):
        self.student.model[1].running_mean += 0.1
        return self.teacher
"""

TEACHER_IN_TRAINING_MODE = """
class Sinner(Good):
    def __init__(self, config, build):
        super().__init__(config, build)
        self.teacher.train()
"""

TEACHER_WITH_GRADIENTS = """
class Sinner(Good):
    def changed(self, terms, clock, labelled, unlabelled):
        self.teacher.requires_grad_(True)
        return [terms[0], (1.0, Share(self.teacher(labelled.image).sum() * 0, torch.ones(())))]
"""

TEACHER_IS_THE_STUDENT = """
class Sinner(Good):
    def __init__(self, config, build):
        super().__init__(config, build)
        self.teacher.load_state_dict(self.student.state_dict(), assign=True)
        self.teacher.requires_grad_(False)
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.data = new.data
"""

TEACHER_MOVES_BY_ITSELF = """
class Sinner(Good):
    def changed(self, terms, clock, labelled, unlabelled):
        for buffer in self.teacher.buffers():
            buffer += 1
        return terms
"""

TOUCHES_THE_CRITIC = """
class Sinner(Good):
    def __init__(self, config, build):
        super().__init__(config, build)
        self.critic = nn.Conv2d(3, 1, 1)
        self.optimizers["critic"] = torch.optim.SGD([{"params": self.critic.parameters(), "peak_lr": 0.1}], 0.1)

    def changed(self, terms, clock, labelled, unlabelled):
        return terms

    def backward(self, name, *terms):
        values = super().backward(name, *terms)
        self.critic(self.student(torch.ones(1, 3, 8, 8))).sum().backward()
        self.student.zero_grad()
        return values
"""

MEAN_OF_THE_SELECTED = """
class Sinner(Good):
    def changed(self, terms, clock, labelled, unlabelled):
        logits = self.student(labelled.image)
        valid = labelled.mask != IGNORE
        nats = nn.functional.cross_entropy(logits, labelled.mask.long().clamp(max=2), reduction="none")
        return [(1.0, Share(nats[valid].mean(), torch.ones(()))), terms[1]]
"""

MEAN_OF_ITS_OWN = """
class Sinner(Good):
    def changed(self, terms, clock, labelled, unlabelled):
        return [(weight, Share(s.total / s.count, torch.ones(()))) for weight, s in terms]
"""

OPENS_MASKS = """
class Sinner(Good):
    def streams(self, data, batch, crop):
        self.masks = len(list((Path(data.config.root) / "masks" / "train").glob("*.png")))
        return super().streams(data, batch, crop)

    def changed(self, terms, clock, labelled, unlabelled):
        return [(float(self.masks), terms[0][1]), terms[1]]
"""

BLIND = """
class Sinner(Good):
    def changed(self, terms, clock, labelled, unlabelled):
        return [terms[0], (0.0, terms[1][1])]

    def step(self, clock, labelled, unlabelled):
        return super().step(clock, labelled, type(unlabelled)(labelled.image, labelled.valid,
                            unlabelled.table, unlabelled.partner, unlabelled.row))
"""

DEAD_OPTION = """
class Sinner(Good):
    class Config(Config):
        unused: float = 0.5
"""

UNKNOWN_KIND = """
class Sinner(Good):
    class Config(Config):
        unclear: tuple[str, ...] = ("a",)
"""


def outsider(folder: Path, sin: str = "", name: str = "Good") -> Case:
    (folder / "own.py").write_text(TINY + textwrap.dedent(sin), encoding="utf-8")
    return Case(f"own.py:{name}", folder, base=folder, network={"name": "own.py:Net"})


def test_an_outsiders_method_keeps_the_contract(tmp_path: Path) -> None:
    testing.check_method(outsider(tmp_path), idle={"kind": "a word that nothing reads"})


@pytest.mark.parametrize(
    ("check", "sin", "message"),
    [
        (testing.check_resume, HIDDEN_STATE, "killed between checkpoints"),
        (testing.check_resume, CARELESS_OF_DISK, "killed between checkpoints"),
        (testing.check_workers, PROCESS_STATE, "chance"),
        (testing.check_seed, DEAF_TO_THE_SEED, "seed changes nothing"),
        (testing.check_observers, MOVED_BY_EVALUATION, "more often"),
        (testing.check_gradients, TEACHER_IN_TRAINING_MODE, "training mode"),
        (testing.check_gradients, TEACHER_WITH_GRADIENTS, "with gradients"),
        (testing.check_gradients, TEACHER_IS_THE_STUDENT, "one tensor"),
        (testing.check_gradients, TEACHER_MOVES_BY_ITSELF, "without EMA"),
        (testing.check_gradients, TOUCHES_THE_CRITIC, "another optimiser"),
        (testing.check_ignored, MEAN_OF_THE_SELECTED, "is nan for a batch"),
        (testing.check_processes, MEAN_OF_ITS_OWN, "off one"),
        (testing.check_masks, OPENS_MASKS, "not labelled"),
        (testing.check_unlabelled, BLIND, "no effect"),
        (testing.check_options, DEAD_OPTION, r"unused=0\.0 gives the same losses"),
        (testing.check_options, UNKNOWN_KIND, "none can be made up"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "" if "\n" in value else value,
)
def test_a_broken_contract_is_found(check: Callable[[Case], None], sin: str, message: str, tmp_path: Path) -> None:
    case = outsider(tmp_path, sin, "Sinner")
    with pytest.raises(AssertionError, match=message):
        check(case) if check is not testing.check_options else check(case, idle={"kind": "unread"})


def test_unlabelled_images_that_must_not_matter(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="change the run"):
        testing.check_unlabelled(outsider(tmp_path), used=False)


def test_an_idle_option_must_exist(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="gone is no option"):
        testing.check_options(outsider(tmp_path), idle={"gone": "removed long ago"})


STAGES = """
class Stages(Method):
    Config = Config
    paper = "none"

    def __init__(self, config, build):
        self.config, self.build = config, build

    def fit(self, session, data):
        teacher = session.stage("teacher").train(Supervised(Supervised.Config(), self.build), data)
        student = Good(self.config, self.build)
        student.teacher.load_state_dict(teacher.state_dict())
        return session.stage("student").train(student, data)
"""


def test_every_stage_of_a_method_is_resumed(tmp_path: Path) -> None:
    case = outsider(tmp_path, STAGES, "Stages")
    testing.check_resume(case)
    testing.check_gradients(case)
    assert len(testing.losses(case, steps=3)) == 6


FORGETFUL = """
class Sinner(Stages):
    def fit(self, session, data):
        delivered = super().fit(session, data)
        return session.stage("last").train(Late(self.config, self.build, delivered), data)


class Late(Good):
    count = 0

    def __init__(self, config, build, start):
        super().__init__(config, build)
        self.student.load_state_dict(start.state_dict())

    def changed(self, terms, clock, labelled, unlabelled):
        self.count += 1
        return [(float(self.count), terms[0][1]), terms[1]]
"""


def test_a_late_stage_that_forgets_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"last/checkpoints/last\.pt"):
        testing.check_resume(outsider(tmp_path, STAGES + FORGETFUL, "Sinner"))
