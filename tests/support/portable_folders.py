"""Loads portable folders where the package cannot be imported, and compares with what was saved beside them.

python -I portable_folders.py ROOT: every folder below that holds ``outputs.pt``, and ``uses`` of those that hold a
file of that name. With a second argument: the repositories of the Hub that it lists.
"""

import importlib.abc
import json
import sys
from pathlib import Path

FILE = "modeling_hf_vitprune.py"


def said(fields):
    """A config without what transformers adds to some when it saves them."""
    if not isinstance(fields, dict):
        return fields
    return {name: said(value) for name, value in fields.items() if name not in ("dtype", "architectures")}


class NoPackage(importlib.abc.MetaPathFinder):
    """As if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_vitprune", "hf_vitprune_cli"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def load(folder: Path, **settings):
    import transformers

    autos = json.loads((folder / "config.json").read_text())["auto_map"]
    auto = next(name for name in sorted(autos, reverse=True) if name not in ("AutoConfig", "AutoBackbone"))
    return aligned(getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **settings).eval())


def aligned(model):
    """Weights that are mapped from a file may run other kernels."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def uses(folder: Path, expected) -> None:
    """What else an image classifier is loaded, run, trained and saved by."""
    import torch
    import transformers
    from PIL import Image

    from tiny import LABELS, SIZE, assert_same, images, relative_error, run

    auto = transformers.AutoModelForImageClassification
    half = load(folder, dtype=torch.bfloat16)
    assert (
        half.dtype == torch.bfloat16
        and relative_error(run(half, images().bfloat16())["logits"].float(), expected) < 0.2
    )
    placed = auto.from_pretrained(folder, trust_remote_code=True, device_map="auto")
    assert relative_error(run(placed.eval())["logits"], expected) < 1e-5
    model = load(folder)
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert (folder / "shards" / "model.safetensors.index.json").is_file()
    assert_same(load(folder / "shards").state_dict(), model.state_dict())
    other = auto.from_pretrained(folder, trust_remote_code=True, num_labels=LABELS + 1, ignore_mismatched_sizes=True)
    assert other.classifier.out_features == LABELS + 1
    fresh = auto.from_config(model.config, trust_remote_code=True)
    assert all(torch.isfinite(value).all() for value in run(fresh.eval()).values())
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(folder)
    picture = Image.new("RGB", (40, 30), (200, 30, 90))
    pipe = transformers.pipeline("image-classification", model=str(folder), trust_remote_code=True)
    logits = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)
    assert abs(pipe(picture, top_k=1)[0]["score"] - float(logits.max())) < 1e-5
    rows = [{"pixel_values": row, "labels": i % LABELS} for i, row in enumerate(images(8))]
    arguments = transformers.TrainingArguments(
        str(folder / "training"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_steps=3,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(before["classifier.weight"], model.classifier.weight)
    trainer.save_model(folder / "trained")
    for saved in (folder / "trained", folder / "training" / "checkpoint-3"):
        assert_same(load(saved).state_dict(), model.state_dict())
    try:
        (folder / "broken").mkdir()
        for name in ("config.json", FILE):
            (folder / "broken" / name).write_text((folder / name).read_text())
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        state.pop(sorted(name for name in state if "layers.0" in name)[0])
        save_file(state, folder / "broken" / "model.safetensors", {"format": "pt"})
        load(folder / "broken")
    except RuntimeError as error:
        assert "lacks 1 tensors" in str(error), error
    else:
        raise AssertionError("a checkpoint without one of its tensors was loaded")


def outputs_of(folder: Path, model):
    """What the model gives for the inputs that the folder was made with."""
    import tiny
    import tiny_composites

    kind = (folder / "kind").read_text()
    if kind in tiny_composites.COMPOSITES:
        return tiny_composites.outputs(model, tiny_composites.COMPOSITES[kind]()[1])
    return tiny.run(model)


def main(roots: list[str]) -> None:
    import torch
    import transformers

    from tiny import assert_same

    root = roots[0]
    for repository in roots[1:]:
        model = aligned(
            transformers.AutoModelForImageClassification.from_pretrained(repository, trust_remote_code=True).eval()
        )
        assert_same(outputs_of(Path(root), model), torch.load(Path(root) / "pushed.pt", weights_only=True))
        print(repository)
    if not roots[1:]:
        for saved in sorted(Path(root).rglob("outputs.pt")):
            folder = saved.parent
            for auto in (transformers.AutoConfig, transformers.AutoModel):
                try:
                    auto.from_pretrained(folder, trust_remote_code=False)
                except ValueError as error:
                    assert "trust_remote_code=True" in str(error), error
                else:
                    raise AssertionError(f"{folder} was loaded without its code")
            model = load(folder)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            expected = torch.load(saved, weights_only=True)
            assert_same(outputs_of(folder, model), expected)
            again = folder / "again"
            model.save_pretrained(again)
            (again / "kind").write_text((folder / "kind").read_text())
            again_model = load(again)
            assert_same(outputs_of(again, again_model), expected)
            assert (folder / FILE).read_text() == (again / FILE).read_text(), folder
            first, second = (said(json.loads((f / "config.json").read_text())) for f in (folder, again))
            assert first == second, folder
            if (folder / "uses").is_file():
                uses(folder, expected["logits"])
            print(folder.relative_to(root))


if __name__ == "__main__":
    sys.meta_path.insert(0, NoPackage())
    sys.path.insert(0, str(Path(__file__).parent))
    import torch as _torch
    import transformers as _transformers

    _torch.set_num_threads(1)
    _transformers.logging.set_verbosity_error()
    _transformers.logging.disable_progress_bar()
    main(sys.argv[1:])
