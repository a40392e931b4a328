"""LaViDa, natively: loads the published checkpoint, matches the reference's numbers, takes any selector."""

from lavida_adapter.adapter import load_adapter, save_adapter
from lavida_adapter.adaptive_k import AdaptiveK
from lavida_adapter.cache_pack import CachePacker, Cast, Fp8, Int8
from lavida_adapter.cache_retain import LayerRetention
from lavida_adapter.cache_select import CacheSelector
from lavida_adapter.config import LavidaConfig, LladaConfig, VisionConfig
from lavida_adapter.denoise import DecodeConfig, Generation
from lavida_adapter.fastv import FastV
from lavida_adapter.lora import LoraConfig, add_lora, merge_lora
from lavida_adapter.loss import TrainBatch
from lavida_adapter.model import Lavida
from lavida_adapter.objective import ObjectiveConfig
from lavida_adapter.prefix import Prefix
from lavida_adapter.redvtp import RedVTP

__all__ = [
    "AdaptiveK",
    "CachePacker",
    "CacheSelector",
    "Cast",
    "DecodeConfig",
    "FastV",
    "Fp8",
    "Generation",
    "Int8",
    "Lavida",
    "LavidaConfig",
    "LayerRetention",
    "LladaConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "Prefix",
    "RedVTP",
    "TrainBatch",
    "VisionConfig",
    "add_lora",
    "load_adapter",
    "merge_lora",
    "save_adapter",
]
