"""Other tensors in the places of a model's own."""

import torch
from torch import nn

from quintnet_dt.places import Place, parameter_owners, put, stand_in


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)


def test_owners_are_all_places_of_a_parameter():
    model = Tied()
    owners = parameter_owners(model)
    assert owners["embed.weight"] == [
        Place(model.embed, "weight"),
        Place(model.head, "weight"),
    ]
    assert owners["head.bias"] == [Place(model.head, "bias")]
    assert "head.weight" not in owners


def test_stand_ins_keep_ties_and_what_they_stand_for_returns_wherever_they_were_moved():
    model = Tied()
    embed, mean, order = (
        model.embed.weight,
        model.norm.running_mean,
        list(model.state_dict()),
    )
    other, zeros = nn.Parameter(torch.ones(6, 4)), torch.zeros(4)
    stand_in(model, {id(embed): other, id(mean): zeros})
    assert model.embed.weight is model.head.weight is other
    assert model.norm.running_mean is zeros and list(model.state_dict()) == order
    del model.embed.weight
    model.added = nn.Linear(4, 6)
    model.added.weight = other
    stand_in(model, {id(other): embed, id(zeros): mean})
    assert model.head.weight is model.added.weight is embed
    assert model.norm.running_mean is mean


def test_a_module_that_keeps_its_parameters_elsewhere_too_is_told():
    lstm = nn.LSTM(3, 2)
    whole, order, x = lstm.weight_hh_l0, list(lstm._parameters), torch.ones(1, 3)
    expected = lstm(x)[0]
    # no leaf, as what is shown
    put(lstm, "weight_hh_l0", torch.zeros_like(whole) + whole)
    assert lstm._flat_weights[1] is lstm.weight_hh_l0 is not whole
    assert list(lstm._parameters) == order and torch.equal(lstm(x)[0], expected)
    put(lstm, "weight_hh_l0", whole)
    assert lstm._flat_weights[1] is lstm.weight_hh_l0 is whole
