"""A split model of transformers as that library itself takes it: saved, wrapped by
peft."""

import copy

import peft
import pytest
import torch
from models import hf
from ranks import run_ranks

from quintnet_dt import apply_tensor_parallel, plan_tensor_parallel


def llama():
    torch.manual_seed(0)
    return hf.llama(tie_word_embeddings=False)


def adapted(task_type=None):
    config = peft.LoraConfig(
        target_modules=["q_proj"], r=4, init_lora_weights=False, task_type=task_type
    )
    return peft.get_peft_model(llama(), config)


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_saved_is_the_whole_model(n, tmp_path):
    def ranks(rank):
        model = apply_tensor_parallel(llama(), n)
        model.save_pretrained(tmp_path / "model")
        adapters = adapted("CAUSAL_LM")
        expected = peft.get_peft_model_state_dict(copy.deepcopy(adapters))
        apply_tensor_parallel(adapters, n)
        adapters.save_pretrained(tmp_path / "adapters")
        torch.distributed.barrier()
        found = hf.LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
        assert all(
            torch.equal(found[name], x) for name, x in llama().state_dict().items()
        )
        found = peft.utils.load_peft_weights(str(tmp_path / "adapters"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())

    run_ranks(ranks, n)


def test_trainers_are_told_that_it_is_split():
    def ranks(rank):
        model = apply_tensor_parallel(adapted(), 2)
        for m in (model, model.base_model.model):
            assert (
                m.tp_size == m._tp_size == 2
                and m.is_distributed_loading_by_transformers
            )
        assert "distributed_config" not in model.config.to_dict()

    run_ranks(ranks, 2)


def test_a_wrapper_that_hands_all_arguments_on_is_looked_through():
    plans = [plan_tensor_parallel(adapted(task), 2) for task in (None, "CAUSAL_LM")]
    hows = [sorted(e.how for e in plan.entries.values()) for plan in plans]
    assert hows[0] == hows[1] and "local" in hows[0]
