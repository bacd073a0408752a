"""Logit predictors: features in, bias logits out."""

from lib.predictors.base import NoPredictor, Predictor, initial_weight
from lib.predictors.caches import APE, Cache, ProKeR, SimilarCaches, TrainedCache
from lib.predictors.heads import GDA, MLP, ConvexHead, LinearProbe, MultiBranchHead
from lib.predictors.text import CLIPAdapter, CrossModal, LPPlusPlus, TaskRes, TextProbe
from lib.predictors.transductive import MAdapter, TransCLIP

__all__ = [
    "APE",
    "CLIPAdapter",
    "Cache",
    "ConvexHead",
    "CrossModal",
    "GDA",
    "LPPlusPlus",
    "LinearProbe",
    "MAdapter",
    "MLP",
    "MultiBranchHead",
    "NoPredictor",
    "Predictor",
    "ProKeR",
    "SimilarCaches",
    "TaskRes",
    "TextProbe",
    "TrainedCache",
    "TransCLIP",
    "initial_weight",
]
