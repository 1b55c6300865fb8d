"""A small configuration of each family."""

from transformers import BertConfig, DistilBertConfig, GPT2Config, RobertaConfig

SMALL = {
    "bert": BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64),
    "distilbert": DistilBertConfig(vocab_size=99, dim=32, n_layers=4, n_heads=4, hidden_dim=64),
    "roberta": RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    ),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4),
}
