"""A small configuration of each family."""

from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

SHAPE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
SMALL = {
    "bert": BertConfig(**SHAPE),
    "distilbert": DistilBertConfig(vocab_size=99, dim=32, n_layers=4, n_heads=4, hidden_dim=64),
    "roberta": RobertaConfig(**SHAPE),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4),
    "xlm-roberta": XLMRobertaConfig(**SHAPE),
    "camembert": CamembertConfig(**SHAPE),
    "electra": ElectraConfig(**SHAPE, embedding_size=16),
    "modernbert": ModernBertConfig(**SHAPE, **SPECIAL, cls_token_id=2, sep_token_id=3, local_attention=4),
    "eurobert": EuroBertConfig(**SHAPE, **SPECIAL, num_key_value_heads=4, mask_token_id=4),
}
