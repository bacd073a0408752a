"""Logit predictors: features in, bias logits out."""

from lib.predictors.base import NoPredictor, Predictor, hyper_parameters, initial_weight
from lib.predictors.caches import APE, Cache, ProKeR, SimilarCaches, StaticMemory, TrainedCache
from lib.predictors.heads import GDA, MLP, ConvexHead, LinearProbe, MultiBranchHead
from lib.predictors.online import TDA
from lib.predictors.prompts import TIMO, WeightedPrompts
from lib.predictors.text import CLIPAdapter, CrossModal, LPPlusPlus, SSText, TaskRes, TextProbe
from lib.predictors.transductive import ClassPrior, MAdapter, StatA, TransCLIP, ZLaP
