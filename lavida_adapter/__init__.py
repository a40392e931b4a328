"""LaViDa in plain PyTorch: loads the published checkpoint, matches the reference's numbers, takes any selector."""

from lavida_adapter.adapter_files import load_adapter, save_adapter
from lavida_adapter.cache_compression.adaptive_k import AdaptiveK
from lavida_adapter.cache_compression.compressor import CachePacker, CacheSelector
from lavida_adapter.cache_compression.dart import DART
from lavida_adapter.cache_compression.fastv import FastV
from lavida_adapter.cache_compression.layer_retention import LayerRetention
from lavida_adapter.cache_compression.pyramiddrop import PyramidDrop
from lavida_adapter.cache_compression.quantize import Cast, Fp8, Int8
from lavida_adapter.cache_compression.redvtp import RedVTP
from lavida_adapter.cache_compression.sparsevlm import SparseVLM
from lavida_adapter.config import LavidaConfig, VisionConfig
from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.generate import Generation
from lavida_adapter.infill import Infilled
from lavida_adapter.lm_config import DreamConfig, LanguageModelConfig, LladaConfig
from lavida_adapter.lora import LoraConfig, add_lora, merge_lora
from lavida_adapter.loss import TrainBatch
from lavida_adapter.model import Lavida
from lavida_adapter.objective import ObjectiveConfig
from lavida_adapter.prefix import Prefix
from lavida_adapter.relevance import External, LmEmbed, NoRelevance, Relevance, RelevanceContext, SiglipText

__all__ = [
    "DART",
    "AdaptiveK",
    "CachePacker",
    "CacheSelector",
    "Cast",
    "DecodeConfig",
    "DreamConfig",
    "External",
    "FastV",
    "Fp8",
    "Generation",
    "Infilled",
    "Int8",
    "LanguageModelConfig",
    "Lavida",
    "LavidaConfig",
    "LayerRetention",
    "LladaConfig",
    "LmEmbed",
    "LoraConfig",
    "NoRelevance",
    "ObjectiveConfig",
    "Prefix",
    "PyramidDrop",
    "RedVTP",
    "Relevance",
    "RelevanceContext",
    "SiglipText",
    "SparseVLM",
    "TrainBatch",
    "VisionConfig",
    "add_lora",
    "load_adapter",
    "merge_lora",
    "save_adapter",
]
