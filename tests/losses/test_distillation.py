"""Distillation: the formulas of DeiT, exactness under gradient accumulation, and a teacher that stays outside."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.losses.distillation import DistillationConfig, Teacher, distillation_term, task_share
from hf_vitprune.methods import NViT


def vit(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(
        ViTConfig(**{**sizes, "image_size": 16, "patch_size": 8, "num_labels": 3, **changes})
    )


def distillation_loss(student, teacher, task, config, loss_scale=1.0, **kwargs):
    """As ``training.lessons.Answers`` puts them together."""
    return task_share([config]) * task + loss_scale * distillation_term(student, teacher, config, **kwargs)


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "medium"}, {"weight": -0.1}, {"weight": 1.1}, {"weight": math.nan}, {"temperature": 0.0}]
    + [{"temperature": math.inf}, {"temperature": math.nan}],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillationConfig(**wrong)


def test_soft_is_equation_2():
    student = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.5, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    task, temperature, weight = torch.tensor(0.7, dtype=torch.float64), 3.0, 0.1
    divergence = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        ps = [math.exp(x / temperature) for x in s]
        pt = [math.exp(x / temperature) for x in t]
        divergence += sum(b / sum(pt) * math.log((b / sum(pt)) / (a / sum(ps))) for a, b in zip(ps, pt, strict=True))
    expected = (1 - weight) * 0.7 + weight * temperature**2 * divergence / 2
    config = DistillationConfig("soft", weight=weight, temperature=temperature)
    assert distillation_loss(student, teacher, task, config).item() == pytest.approx(expected, rel=1e-12)


def test_hard_is_equation_3():
    student, teacher, task = torch.randn(4, 5), torch.randn(4, 5), torch.tensor(2.0)
    expected = 0.5 * task + 0.5 * F.cross_entropy(student, teacher.argmax(-1))
    config = DistillationConfig("hard", weight=0.5, temperature=7.0)
    torch.testing.assert_close(distillation_loss(student, teacher, task, config), expected)


def test_a_distillation_head_takes_the_term():
    classes, distilled = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    config = DistillationConfig("soft", weight=0.5)
    task = F.cross_entropy(classes, torch.tensor([0, 1]))
    distillation_loss(classes, torch.randn(2, 3), task, config, distillation_logits=distilled).backward()
    only_task = torch.autograd.grad(0.5 * F.cross_entropy(classes, torch.tensor([0, 1])), classes)[0]
    torch.testing.assert_close(classes.grad, only_task)
    assert distilled.grad.abs().sum() > 0


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(2, 3, requires_grad=True)
    loss = distillation_loss(
        torch.randn(2, 3, requires_grad=True), teacher, torch.tensor(0.0), DistillationConfig("soft")
    )
    loss.backward()
    assert teacher.grad is None


def test_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    config, zero = DistillationConfig("soft", weight=1.0), torch.tensor(0.0)
    loss = distillation_loss(student, teacher, zero, config)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float(), zero, config))


def test_logits_that_do_not_match_are_refused():
    config = DistillationConfig("soft")
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        distillation_loss(torch.randn(2, 3), torch.randn(2, 4), torch.tensor(0.0), config)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulated_micro_batches_equal_the_big_batch(kind, as_tensor):
    config = DistillationConfig(kind, weight=0.3, temperature=2.0)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (8,), generator=generator)
    teacher_logits = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_()

    def gradient(micro_batch):
        weight.grad = None
        items = torch.tensor(8) if as_tensor else 8
        for x, y, t in zip(*(z.split(micro_batch) for z in (inputs, labels, teacher_logits)), strict=True):
            task = F.cross_entropy(x @ weight, y, reduction="sum") / 8  # as a transformers model does
            distillation_loss(x @ weight, t, task, config, num_items_in_batch=items).backward()
        return weight.grad.clone()

    big = gradient(8)
    torch.testing.assert_close(gradient(2), big, rtol=1e-12, atol=1e-14)
    # no accumulation, no count: the same
    weight.grad = None
    task = F.cross_entropy(inputs @ weight, labels)
    distillation_loss(inputs @ weight, teacher_logits, task, config).backward()
    torch.testing.assert_close(weight.grad, big, rtol=1e-12, atol=1e-14)


def test_processes_that_average_gradients_equal_the_big_batch():
    config = DistillationConfig("soft", weight=0.3, temperature=2.0)
    inputs, teacher_logits = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (8,))
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def loss(rows, processes):
        logits = inputs[rows] @ weight
        task = processes * F.cross_entropy(logits, labels[rows], reduction="sum") / 8  # as Trainer.compute_loss does
        return distillation_loss(
            logits, teacher_logits[rows], task, config, num_items_in_batch=8, loss_scale=processes
        )

    (big,) = torch.autograd.grad(loss(slice(0, 8), 1), weight)
    halves = [torch.autograd.grad(loss(rows, 2), weight)[0] for rows in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, big, rtol=1e-12, atol=1e-14)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": image, "labels": i % 3}


class DistillingTrainer(Trainer):
    """The way that `distillation_loss` is meant to be used."""

    def __init__(self, *args, teacher, config, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.config = teacher, config

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        task, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        logits = self.teacher(inputs["pixel_values"], autocast=self.accelerator.autocast())
        loss = distillation_loss(outputs.logits, logits, task, self.config, num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def test_trainer_steps_are_the_same_with_and_without_accumulation(tmp_path):
    torch.manual_seed(0)
    student, teacher = vit(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double(), vit().double()
    before = copy.deepcopy(student.state_dict())
    trained = []
    for batch, accumulation in ((8, 1), (2, 4)):
        student.load_state_dict(before)
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            learning_rate=0.1, optim="sgd", report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            max_grad_norm=0.0,
        )  # fmt: skip
        data = [
            {**item, "pixel_values": item["pixel_values"].double()} for item in map(Images().__getitem__, range(8))
        ]
        config = DistillationConfig("soft", weight=0.5, temperature=2.0)
        DistillingTrainer(student, args, train_dataset=data, teacher=Teacher(teacher, student), config=config).train()
        trained.append(copy.deepcopy(student.state_dict()))
    assert not torch.equal(trained[0]["classifier.weight"], before["classifier.weight"])
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_a_teacher_stays_out_of_the_student():
    student, model = vit(), vit(hidden_dropout_prob=0.5)
    keys, parameters = set(student.state_dict()), len(list(student.parameters()))
    student.teacher = Teacher(model, student)
    assert set(student.state_dict()) == keys and len(list(student.parameters())) == parameters
    student.train()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(student.teacher(images), student.teacher(images))  # dropout stays off
    model.train()  # a teacher that somebody else switched
    assert torch.equal(student.teacher(images), student.teacher(images))
    assert not student.teacher(images).requires_grad
    assert all(p.requires_grad for p in model.parameters())  # it may be trained, or pruned, afterwards


def test_a_teacher_may_be_of_another_family_and_precision():
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    teacher = Teacher(SwinForImageClassification(config).bfloat16(), vit())
    assert teacher(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_a_teacher_runs_in_the_autocast_it_is_given():
    teacher = Teacher(vit())
    images = torch.randn(2, 3, 16, 16)
    assert teacher(images).dtype is torch.float32
    assert teacher(images, autocast=torch.autocast("cpu", torch.bfloat16)).dtype is torch.bfloat16


def test_a_teacher_follows_the_batch_to_its_device():
    teacher = Teacher(vit())
    assert teacher(torch.randn(2, 3, 16, 16, device="meta")).device.type == "meta"


def test_a_teacher_that_does_not_fit_is_refused():
    student = vit()
    with pytest.raises(ValueError, match="5 classes and the student 3"):
        Teacher(vit(num_labels=5), student)
    with pytest.raises(ValueError, match="share tensors"):
        Teacher(student, student)
    names = {"id2label": {0: "a", 1: "b", 2: "c"}}, {"id2label": {0: "b", 1: "a", 2: "c"}}
    with pytest.raises(ValueError, match="different order"):
        Teacher(vit(**names[0]), vit(**names[1]))
    with pytest.raises(ValueError, match="different order"):  # the same classes, though not by the same words
        Teacher(
            vit(id2label={0: "big dog", 1: "cat, Felis", 2: "emu"}), vit(id2label={0: "cat", 1: "Big_dog", 2: "emu"})
        )
    Teacher(vit(id2label={0: "cat, Felis", 1: "dog", 2: "emu"}), vit(id2label={0: "cat", 1: "Dog", 2: "emu"}))
    Teacher(vit(id2label={0: "x", 1: "y", 2: "z"}), vit(**names[0]))
    Teacher(vit(**names[0]), student)  # unnamed classes may be the same ones
    assert all(p.requires_grad for p in student.parameters())


def test_a_teacher_without_logits_is_refused():
    with pytest.raises(TypeError, match="logits"):
        Teacher(ViTModel(vit().config))(torch.randn(2, 3, 16, 16))


def test_a_teacher_without_parameters_works():
    class Constant(nn.Module):
        def forward(self, pixel_values):
            return type("Output", (), {"logits": torch.zeros(len(pixel_values), 3)})

    assert Teacher(Constant(), vit())(torch.randn(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_kl_is_added_whole_in_either_direction(direction):
    """Worked out by hand; no square of the temperature, and nothing taken from the task loss."""
    student = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.5, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    divergence = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        ps, pt = ([math.exp(x / 3) / sum(math.exp(y / 3) for y in row) for x in row] for row in (s, t))
        p, q = (pt, ps) if direction == "teacher_student" else (ps, pt)
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    config = DistillationConfig("kl", weight=100.0, temperature=3.0, direction=direction)
    loss = distillation_loss(student, teacher, torch.tensor(0.7, dtype=torch.float64), config)
    assert loss.item() == pytest.approx(0.7 + 100 * divergence / 2, rel=1e-12)


def test_kl_goes_the_released_way_by_default():
    assert DistillationConfig("kl").direction == NViT.traits.distillation.direction == "teacher_student"
    with pytest.raises(InvalidConfigError, match="direction is one of"):
        DistillationConfig("kl", direction="both")
    with pytest.raises(InvalidConfigError, match="one direction only"):
        DistillationConfig("soft", direction="student_teacher")


def test_the_task_keeps_what_shares_leave():
    hard, soft, kl = DistillationConfig("hard", 0.5), DistillationConfig("soft", 0.3), DistillationConfig("kl", 100.0)
    assert task_share([]) == task_share([kl]) == 1.0
    assert task_share([hard, kl, soft]) == pytest.approx(0.2)
    with pytest.raises(InvalidConfigError, match=r"0\.5 \+ 0\.5 \+ 0\.3 are more than 1"):
        task_share([hard, hard, soft])
