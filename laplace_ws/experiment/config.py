"""What a run of the command line is made of: one dataclass per section of the YAML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from laplace_ws.curvature import Curvature
from laplace_ws.errors import InputError
from laplace_ws.kfac import KfacApprox
from laplace_ws.marglik import Schedule, TrainingOptions
from laplace_ws.marglik.hyperparameters import HyperOptimizer
from laplace_ws.marglik.optimizers import SGD_DEFAULTS
from laplace_ws.marglik.schedule import ScheduleOptions
from laplace_ws.models import Norm
from laplace_ws.option_errors import OptionError
from laplace_ws.options import OneOf, UnknownKeyError, from_mapping
from laplace_ws.posterior import PriorStructure

_NOT_PART_OF_THE_RESULT = ("name", "out", "workers", "test_every", "report")


class ExperimentError(InputError):
    """The configuration, the data or the run folder does not allow the run; the message says how to mend it."""


_DEFAULTS: dict[str, Any] = {f.name: f.default for cls in (Schedule, TrainingOptions) for f in fields(cls)}


@dataclass(frozen=True)
class DataConfig:
    """Images, or data of one's own, to train and test on.

    Attributes:
        name: fashion-mnist-subset (bundled), fashion-mnist, cifar10, cifar100 or image-folder; of no effect with a factory.
        factory: a function for data of one's own, as package.module:function, in the current folder or installed. It is called with `root`,
            a path, and returns (x_train, y_train, x_test, y_test), tensors of inputs as the network gets them and of classes from 0, or a
            laplace_ws.data.ImageData.
        root: folder of the data; the bundled subset needs none.
        download: whether missing data may be downloaded into `root`.
        n_train: size of a class-balanced subset of the training images; all of them if not given.
        n_test: the same for the test images.
        held_out: whether to test on the training images that n_train leaves out, as long as settings are being chosen.
        batch_size: images per batch.
        augment: whether to crop and flip the training images at random.
        seed: of the choice of n_train and n_test images; the run's if not given. By the same one here, runs of several seeds see the same
            images.
    """

    name: str = "fashion-mnist-subset"
    factory: str | None = None
    root: str = "data"
    download: bool = False
    n_train: int | None = None
    n_test: int | None = None
    held_out: bool = False
    batch_size: int = 128
    augment: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The network; an option that is not given is the model's own default.

    Attributes:
        name: wide-resnet, lenet or mlp; of no effect with a factory.
        factory: a function for a network of one's own, as package.module:function, in the current folder or installed. It is called with
            input_shape, such as (1, 28, 28), n_classes, and those of the following options that are given, all by name, and returns a
            torch.nn.Module from inputs [N, *input_shape] to logits [N, n_classes].
        depth: layers of a wide-resnet, 6n + 4.
        width: width factor of a wide-resnet.
        norm: of a wide-resnet: fixup, batch, group or none.
        hidden: units of an mlp's hidden layers.
        activation: of an mlp.
        dropout: share of the activations that are dropped in training: between the convolutions of a block of a wide-resnet, before the
            linear layers of the others.
    """

    name: str = "wide-resnet"
    factory: str | None = None
    depth: int | None = None
    width: int | None = None
    norm: OneOf[Norm] | None = None
    hidden: list[int] | None = None
    activation: str | None = None
    dropout: float | None = None


@dataclass(frozen=True)
class MarglikConfig(ScheduleOptions):
    """Training, and the tuning in it; see `laplace_ws.marglik.marglik_training`.

    Attributes:
        hyper_optimizer: newton (to the optimum within max_log_step), adam or mackay; if not given, newton, or adam with tune_temperature,
            which needs it.
        lr_hyp: step size of adam on their logarithms.
        prior_structure: which parameters share a prior precision; weight is for diag and full.
        prior_prec_init: start of the prior precisions; 0.01 times the number of images if not given. With layerwise, the
            elementwise scales and biases of norms and Fixup start at 1 whatever is given.
        temperature_init: temperature of the likelihood, at the start.
        tune_temperature: whether to tune it.
        hessian_structure: of the Laplace approximation: kron, ekfac, diag, full or lowrank.
        curvature: exact GGN, GGN by sampled labels, or empirical Fisher.
        kfac_approx: of the tuning: auto, expand or reduce, or a mapping from a pattern of layers to one of them; reduce if not given.
        max_factor_dim: rows of the widest Kronecker factor that is kept whole; of wider ones only the diagonal is; no limit if not given.
        backend: native, asdl or backpack: who runs the model for the curvature; the numbers are the same.
        mc_samples: labels or signs drawn per image for ggn_mc and ggn_mc_rademacher.
        final_curvature: of the last fit; `curvature` if not given.
        final_kfac_approx: of the last fit, as for `kfac_approx`; where its factors are by another approximation than those of the tuning,
            its prior precisions are chosen anew.
        optimizer: of the weights: sgd, adam, or kfac, which takes kfac_approx too (expand if not given), and whose curvature is that of the
            tunings where every parameter has Kronecker factors.
        lr: its step size at the start.
        lr_min: its step size at the end, to which a cosine takes it; zero if not given.
        momentum: Nesterov momentum of sgd.
        gradient_accumulation_steps: batches per step of the optimizer.
        max_grad_norm: limit of the norm of the gradient over all weights; none if not given.
    """

    hyper_optimizer: OneOf[HyperOptimizer] | None = _DEFAULTS["hyper_optimizer"]
    lr_hyp: float = _DEFAULTS["lr_hyp"]
    prior_structure: OneOf[PriorStructure] = _DEFAULTS["prior_structure"]
    prior_prec_init: float | None = _DEFAULTS["prior_prec_init"]
    temperature_init: float = _DEFAULTS["temperature_init"]
    tune_temperature: bool = _DEFAULTS["tune_temperature"]
    hessian_structure: str = _DEFAULTS["hessian_structure"]
    curvature: OneOf[Curvature] = _DEFAULTS["curvature"]
    kfac_approx: OneOf[KfacApprox] | dict[str, str] | None = _DEFAULTS["kfac_approx"]
    max_factor_dim: int | None = _DEFAULTS["max_factor_dim"]
    backend: str = _DEFAULTS["backend"]
    mc_samples: int = _DEFAULTS["mc_samples"]
    final_curvature: OneOf[Curvature] | None = _DEFAULTS["final_curvature"]
    final_kfac_approx: OneOf[KfacApprox] | dict[str, str] = _DEFAULTS["final_kfac_approx"]
    optimizer: Literal["sgd", "adam", "kfac"] = "sgd"
    lr: float = SGD_DEFAULTS["lr"]
    lr_min: float | None = None
    momentum: float = SGD_DEFAULTS["momentum"]
    gradient_accumulation_steps: int = _DEFAULTS["gradient_accumulation_steps"]
    max_grad_norm: float | None = _DEFAULTS["max_grad_norm"]


@dataclass(frozen=True)
class BaselinesConfig:
    """Networks trained beside the tuned one, from the same start and in the same order of batches.

    Attributes:
        fixed_prior_precisions: one network each; divided by the number of images it is the weight decay. With
            marglik.prior_structure=layerwise it does not reach the elementwise scales and biases of norms and Fixup,
            whose prior precision stays at 1 in all of these networks.
    """

    fixed_prior_precisions: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingConfig:
    """What every command that trains has in common.

    Attributes:
        name: of the folder of the results.
        out: folder of all runs.
        seed: of initialisation, batches and sampling, and of the choice of images unless data.seed is given.
        device: auto takes a GPU if there is one.
        threads: of torch in each process.
        workers: networks that train side by side, each in a process of its own; the numbers are those of one.
        test_every: epochs between two looks at the test set, for the report's curves; nothing is tuned or chosen by them.
        likelihood: of the labels; images have classes.
        data: images to train and test on.
        model: the network.
        marglik: training and tuning.
        report: whether to write a page at the end.
    """

    name: str = "run"
    out: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    workers: int = 1
    test_every: int = 1
    likelihood: Literal["classification"] = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    marglik: MarglikConfig = field(default_factory=MarglikConfig)
    report: bool = True

    @property
    def folder(self) -> Path:
        """Where the results are written."""
        return Path(self.out) / self.name

    @property
    def data_seed(self) -> int:
        """Seed of the choice of images."""
        return self.seed if self.data.seed is None else self.data.seed


@dataclass(frozen=True)
class RunConfig(TrainingConfig):
    """One run: a tuned network, and its baselines.

    Attributes:
        baselines: networks at fixed prior precisions, to compare with.
    """

    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)

    def settings(self) -> dict[str, Any]:
        """What shapes the result, by sections."""
        return {key: value for key, value in asdict(self).items() if key not in _NOT_PART_OF_THE_RESULT}


def read_config(source: Path | Mapping[str, Any]) -> RunConfig:
    """The configuration of a run, as its folder's config.json or its summary says; what is no part of the result may be left out.

    Raises:
        ExperimentError: it is missing, damaged, or of another version of the package.
    """
    where = f"'{source}': " if isinstance(source, Path) else ""
    try:
        values = json.loads(source.read_text(encoding="utf-8")) if isinstance(source, Path) else source
        sections = [f.name for f in fields(RunConfig) if is_dataclass(f.default_factory)]
        given = {key.partition(".")[0] for key in values}
        if missing := [name for name in sections if name not in given]:
            raise UnknownKeyError(f"it has no '{missing[0]}'")
        return from_mapping(RunConfig, values)
    except FileNotFoundError as error:
        raise ExperimentError(
            f"'{source}', which says how the network was made, is missing; give a checkpoint in its run folder"
        ) from error
    except (json.JSONDecodeError, AttributeError, OptionError) as error:
        raise ExperimentError(
            f"{where}the run's configuration cannot be read, as it is not a configuration of this version of laplace_ws ({error}); train "
            "the network again"
        ) from error
