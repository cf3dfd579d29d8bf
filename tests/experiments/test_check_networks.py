"""The survey of torchvision's classifiers, on two of them."""

import sys

import check_torchvision


def test_a_model_that_is_covered_and_one_that_is_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_torchvision.py", "squeezenet1_0", "swin_v2_t"])
    monkeypatch.setattr(check_torchvision, "FACTOR_BACKENDS", ["native"])
    check_torchvision.main()
    *_, covered, refused = capsys.readouterr().out.splitlines()
    assert covered == "| squeezenet1_0 | yes |"
    assert "'features.5.0.attn.cpb_mlp.2.weight' has no Kronecker factors, as it does not enter add as it is" in refused
