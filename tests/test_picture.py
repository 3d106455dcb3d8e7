"""plan.to_html(): one page that needs nothing else, with each weight as it is cut."""

from html.parser import HTMLParser

import torch
from models import gpt, hf
from torch import nn

from quintnet_dt import TensorParallelPlan, plan_tensor_parallel

VOID = {"meta", "br"}


class Page(HTMLParser):
    """What a page holds; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def weights(self, word="weight"):
        """The classes and styles of the rectangles that are drawn, legends aside."""
        found = [
            attrs for tag, attrs in self.tags if attrs.get("class", "")[:7] == "weight "
        ]
        drawn = [x for x in found if "height" in x.get("style", "")]
        return [x for x in drawn if word in x["class"].split()]


def plan_of(model, n=2, **inputs):
    return plan_tensor_parallel(model, n, **inputs)


def test_a_llama_in_a_page():
    model = hf.llama(num_hidden_layers=3)
    plan = plan_of(model)
    html = plan.to_html()
    page = Page(html)
    # nothing is fetched
    assert not any(
        word in html for word in ("http", "src=", "url(", "@import", "<script")
    )
    assert "model.layers.0-2 × 3, drawn once" in page.text
    shown = [name for name, _ in model.named_parameters() if "layers.1" not in name]
    assert len(page.weights()) == len([x for x in shown if "layers.2" not in x])
    assert "2 heads, 1 a rank" in page.text and "64 features, 32 a rank" in page.text
    assert "output: all-reduce, " in page.text
    for entry in plan.entries.values():
        assert f"{entry.how}: " in page.text  # in the legend
    assert str(plan.cost) in page.text
    assert "prefers-color-scheme: dark" in html


def test_weights_are_cut_as_the_plan_cuts_them():
    plan = plan_of(gpt.FusedAttention(), 4, example_inputs=(torch.randn(2, 6, 32),))
    assert plan["qkv.weight"].pieces == 3
    page = Page(plan.to_html())
    (qkv, *_), (proj, *_) = page.weights("rows"), page.weights("columns")
    assert "--cuts:12;--pieces:3" in qkv["style"]
    assert "--cuts:4;--pieces:1" in proj["style"]
    assert "--c:var(--a0)" in qkv["style"] and "--c:var(--a0)" in proj["style"]


def test_a_notebook_shows_the_part_within_the_page():
    plan = plan_of(gpt.ConvNet(), example_inputs=(torch.randn(2, 3, 16, 16),))
    assert plan._repr_html_() in plan.to_html()
    assert "<html" not in plan._repr_html_() and "channels" in plan._repr_html_()
    assert TensorParallelPlan.from_json(plan.to_json()).to_html() == plan.to_html()


def test_plans_of_little_and_of_strange_names():
    x = (torch.randn(2, 8),)
    Page(plan_of(nn.Identity(), example_inputs=x).to_html())
    odd = nn.Sequential()
    odd.add_module("<b>&", nn.Linear(8, 8))
    page = Page(plan_of(odd, example_inputs=x).to_html())
    assert "<b>&.weight" in page.text
