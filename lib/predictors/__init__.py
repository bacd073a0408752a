"""Logit predictors: features in, bias logits out."""

from lib.predictors.base import NoPredictor, Predictor, hyper_parameters, initial_weight
from lib.predictors.caches import APE, Cache, ProKeR, SimilarCaches, TrainedCache
from lib.predictors.heads import GDA, MLP, ConvexHead, LinearProbe, MultiBranchHead
from lib.predictors.text import CLIPAdapter, CrossModal, LPPlusPlus, TaskRes, TextProbe
from lib.predictors.transductive import MAdapter, TransCLIP
