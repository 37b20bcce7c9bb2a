"""Model classes are made when the first config of theirs is there, whichever way it came."""

from __future__ import annotations

import pickle
import threading

import pytest
from transformers import AutoConfig, CLIPVisionConfig, Dinov2Config

from hf_vitprune.modeling import hosts, pruned_config, pruned_config_class, registry
from processes import run_python


def test_every_way_to_a_config_makes_its_models_known() -> None:
    """In a process that has had none: by model type, by class, unpickled; and no others."""
    config = pruned_config_class(Dinov2Config)(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    run_python(
        "import pickle, sys, hf_vitprune\n"
        "from transformers import AutoConfig, AutoModelForImageClassification as Auto\n"
        "from hf_vitprune.modeling import registry\n"
        "made = [AutoConfig.for_model('pruned_vit'), registry.PrunedSwinConfig()]\n"
        "made += [pickle.loads(bytes.fromhex(sys.argv[1]))]\n"
        "for config, name in zip(made, ('ViT', 'Swin', 'Dinov2')):\n"
        "    assert Auto._model_mapping[type(config)] is vars(registry)[f'Pruned{name}ForImageClassification']\n"
        "assert 'PrunedBeitModel' not in vars(registry)\n"
        "assert registry.PrunedBeitModel.dense_class.__name__ == 'BeitModel'\n",
        pickle.dumps(config).hex(),
    )


def test_classes_are_found_by_name_and_others_are_not_there() -> None:
    assert registry.PrunedCLIPVisionModelWithProjection.config_class is pruned_config_class(CLIPVisionConfig)
    assert hosts.PrunedCLIPModel.config_class is type(AutoConfig.for_model("pruned_tower_clip"))
    for module, name in ((registry, "PrunedBertModel"), (registry, "Prunedtorch"), (hosts, "CLIPModel")):
        assert not hasattr(module, name)


def test_another_thread_waits_until_they_are_made() -> None:
    class Config(pruned_config.FirstUseMixin):
        pass

    started, go_on, made = threading.Event(), threading.Event(), []

    def make() -> None:
        started.set()
        go_on.wait(10)
        made.append("models")

    pruned_config.when_used(Config, make)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: (Config(), seen.append(len(made)))) for _ in range(2)]  # type: ignore
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert not seen
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert seen == [1, 1] and made == ["models"]


def test_what_fails_is_tried_again() -> None:
    class Config(pruned_config.FirstUseMixin):
        pass

    answers = iter((ImportError("torchvision"), None))

    def make() -> None:
        if error := next(answers):
            raise error

    pruned_config.when_used(Config, make)
    with pytest.raises(ImportError, match="torchvision"):
        Config()
    assert isinstance(Config(), Config)
    pruned_config.when_used(Config, lambda: pytest.fail("forgotten"))
    pruned_config.forget_models(Config)
    Config()
