"""Layer-wise relevance propagation over the operations that one forward pass ran."""

from shapwrap.explainers.relevance.attentions import AttentionProduct, attention_products
from shapwrap.explainers.relevance.propagation import relevance_of_attention
from shapwrap.explainers.relevance.tape import Operation, Tape

__all__ = [
    "AttentionProduct",
    "Operation",
    "Tape",
    "attention_products",
    "relevance_of_attention",
]
