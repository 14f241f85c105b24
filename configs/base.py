"""Every knob, once, with its unit or its consequence. The other configs are short diffs of this one.

Rules: no lists, no bare None (optional values are placeholders, spelled `none` on the command line),
floats written as floats.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # parameters, data order, masks and dropout all follow from it
    c.init_from = ""  # Hugging Face folder to start from (BERT, RoBERTa, ALBERT, ELECTRA, ModernBERT); sets the shape
    c.reinit_head = False  # with init_from: a new vocabulary head, for a folder that has none (a sentence encoder)

    c.data = ConfigDict()
    c.data.source = "builtin"  # builtin | text:GLOB | jsonl:GLOB#field | tfds:NAME[/config][:split]
    # A folder made by `prepare`, or several and how much of each ("wiki:0.7,books:0.3"; without weights: in proportion
    # to their rows). Then seq_len is that of their rows, and source, packing and validation_every are not used;
    # tokenizer.path may be left out, or names the one that they were made with.
    c.data.corpus = ""
    c.data.cache_dir = "~/.cache/flax_mlm"  # where corpora prepared by `train` itself are kept
    c.data.seq_len = 128  # L, tokens per row, [CLS] and [SEP] included
    c.data.validation_every = 20  # every n-th document is held out
    c.data.packing = "best_fit"  # best_fit (least padding) | sequential (keeps document order)
    c.data.num_workers = 0  # processes for prepare; 0: one per core. The bytes written do not depend on it

    c.tokenizer = ConfigDict()
    c.tokenizer.path = ""  # SentencePiece .model, Hugging Face tokenizer.json, vocab.txt (WordPiece); empty: train one
    c.tokenizer.extra_tokens_file = ""  # a file of words, one a line, each to become a piece of the tokenizer given
    c.tokenizer.model_type = "bpe"  # bpe (converts to tokenizer.json exactly) | unigram
    c.tokenizer.vocab_size = 8192  # V, special tokens and 256 byte pieces included
    c.tokenizer.normalization = "nmt_nfkc"  # nmt_nfkc | nmt_nfkc_cf (also lower-cases) | identity
    c.tokenizer.character_coverage = 0.9995  # share of characters with pieces of their own; the rest go to bytes
    c.tokenizer.sample_bytes = 50_000_000  # text used to train it, spread evenly over the training documents

    c.model = ConfigDict()
    c.model.num_layers = 4  # N
    c.model.hidden_size = 256  # D
    c.model.num_heads = 4  # H, divides hidden_size
    c.model.intermediate_size = 1024  # width inside the MLP; with glu, of each of its two halves
    c.model.max_positions = 512  # longest row the encoder may see
    c.model.position_embedding = "learned"  # learned | rope
    c.model.norm_position = "post"  # post (BERT) | pre (ModernBERT; adds a final norm)
    c.model.norm_eps = 1e-12
    c.model.use_bias = True  # biases in projections and norms
    c.model.glu = False  # gated MLP (GeGLU)
    c.model.type_vocab_size = 2  # token-type embeddings; 0: none
    c.model.embedding_size = 0  # E, width of the embeddings, projected to hidden_size (ALBERT); 0: hidden_size itself
    c.model.share_layers = False  # all layers use the weights of one (ALBERT)
    c.model.global_attn_every_n_layers = 1  # every n-th layer sees the whole segment, the others a window; 1: all do
    # xla | splash (TPU) | cudnn (GPU) | auto: a kernel if no attention dropout, on TPUs from L 512 on, on GPUs from 128
    c.model.attention = "auto"
    c.model.sliding_window = 128  # tokens a windowed layer sees, half on each side
    c.model.rope_theta_global = 10_000.0
    c.model.rope_theta_local = 10_000.0
    c.model.dropout_rate = 0.1  # embeddings, attention output and MLP output
    c.model.attention_dropout_rate = 0.1  # attention probabilities
    c.model.initializer_range = 0.02
    c.model.vocab_multiple_of = 1  # rows of the embedding are rounded up to this; 128 suits TPUs and tensor sharding
    c.model.dtype = "float32"  # of the computation: float32 | bfloat16. Parameters are always float32
    # one compiled layer for all (True), or unrolled (False), faster on CPU and GPU, slower to compile; none: unrolled
    # for up to 12 layers on CPU, up to 24 on GPU without fsdp, else scanned
    c.model.scan_layers = placeholder(bool)
    c.model.remat = (
        "none"  # kept for the backward pass: none (everything) | dots (matmul outputs) | full (layer inputs)
    )

    c.objective = ConfigDict()
    c.objective.name = "mlm"  # mlm | clm (next token, causal attention, same rows in the same order) | rtd (ELECTRA)
    c.objective.masking = "token"  # token | whole_word | span
    c.objective.mask_rate = 0.15  # share of the ordinary tokens of each row that is predicted
    c.objective.mask_replace_prob = 0.8  # share of the selected tokens shown as [MASK]
    c.objective.random_replace_prob = 0.1  # share shown as a random token; what is left is shown unchanged
    c.objective.span_stop = 0.2  # a span ends after each word with this probability (SpanBERT)
    c.objective.span_max_words = 10
    c.objective.attend_across_documents = (
        False  # attention and positions go over the whole row, and not each document's alone
    )
    # × the mean of (log Z)², which keeps scores from drifting (PaLM, ST-MoE: 1e-4), is trained on too, and logged as
    # z_loss; `loss` stays the cross-entropy. 0.0: none
    c.objective.z_loss = 0.0
    # With rtd a generator fills the masks, and the encoder says of every token whether it was replaced.
    c.objective.generator_size = 0.25  # of the generator: share of the encoder's heads, width and MLP
    c.objective.generator_depth = 1.0  # share of its layers
    # how the two share embeddings: none | shared (ELECTRA) | gradient_disentangled (the encoder adds to the
    # generator's, and its gradient does not reach them; DeBERTaV3)
    c.objective.embedding_sharing = "gradient_disentangled"
    c.objective.discriminator_weight = 50.0  # of the encoder's loss, a token's mean, beside the generator's

    c.optimizer = ConfigDict()
    # adamw | stable_adamw (its step of a tensor shrinks where gradients have grown suddenly; max_grad_norm may be 0) |
    # schedule_free (AdamW at a constant rate; an average of the weights, which is what is evaluated, stands in for its
    # decay) | lamb | muon (matrices by Muon; embeddings, norms, biases by AdamW)
    c.optimizer.name = "adamw"
    # peak; muon's updates have the size of AdamW's, but it bears several times the rate: 6e-3 in configs/small.py
    c.optimizer.learning_rate = 5e-4
    c.optimizer.schedule = "linear"  # linear | cosine | wsd (warm-up, stable, decay) | constant
    c.optimizer.warmup_fraction = 0.05  # of the run
    c.optimizer.decay_fraction = 0.2  # of the run, at the end, with wsd only
    c.optimizer.final_lr_fraction = 0.0  # of the peak, at the last step; not used with constant
    c.optimizer.beta1 = 0.9  # of the Adam in each, and schedule-free's interpolation; Muon's own momentum is 0.95
    c.optimizer.beta2 = 0.98
    c.optimizer.eps = 1e-6
    c.optimizer.weight_decay = 0.01  # on matrices and embeddings; never on norms and biases
    c.optimizer.max_grad_norm = 1.0  # global-norm clip; 0.0: none
    c.optimizer.max_skipped_steps = 10  # updates left out in a row (not finite, or a spike) that stop the run
    c.optimizer.spike_action = "none"  # none | clip (ZClip) | skip (the update)
    c.optimizer.spike_threshold = 4.0  # standard deviations of loss or grad norm above its mean; ZClip takes 2.5
    # none | ema | lawa: an average of the weights over the steps, kept beside them (4 bytes a parameter), is what is
    # evaluated, exported and fine-tuned; `evaluate --config.optimizer.averaging=none` asks the last weights instead
    c.optimizer.averaging = "none"
    c.optimizer.ema_decay = 0.999  # of the average a step, at most: (1 + step) / (10 + step) while that is less
    c.optimizer.lawa_every = 200  # steps from one snapshot to the next, counted back from the last step
    c.optimizer.lawa_count = 5  # snapshots in the final average; during the run, 1 to this many

    c.train = ConfigDict()
    # How long the run is: so many steps, or where one of the next four is not 0, that, on whatever machine. A budget
    # holds from start to end, over all restarts, with compilation, evaluations and the last checkpoint.
    c.train.steps = 10_000
    c.train.tokens = 0.0  # without special ones and padding
    c.train.budget_minutes = 0.0  # of the wall clock
    c.train.budget_chip_hours = 0.0  # over all chips
    c.train.budget_cost = 0.0  # in whatever money train.price_per_chip_hour is in
    c.train.price_per_chip_hour = 0.0  # of one chip
    # what changes in the course of the run, from a share of it on (or step, or so much of the unit above):
    # `0%: objective.mask_rate=0.3->0.15; 90%: data.seq_len=512, train.global_batch_size=64` (README, "Phases")
    c.train.phases = ""
    c.train.global_batch_size = 256  # B, rows per step over all devices
    c.train.gradient_accumulation_steps = 1  # gradient accumulation: the batch is taken in this many parts
    # the predicted tokens' scores are made in so many parts, and again in the backward pass: where the vocabulary is
    # large, or each token is predicted (clm), they are most of the memory; of mlm and clm
    c.train.logits_chunks = 1
    c.train.reproducible = (
        False  # the same parameters, bit for bit, on any number of devices that batch_groups allows; slower
    )
    c.train.batch_groups = 8  # with reproducible: parts of the batch, added in order; a multiple of the devices
    c.train.log_every = 20  # steps
    c.train.eval_every = 1000  # steps; 0: only at the end
    c.train.cloze_every = 0  # steps; the built-in clozes' ranks and the model's own words go into the logs; 0: never
    c.train.checkpoint_every = 1000  # steps; the last step is always saved
    c.train.max_to_keep = 2  # checkpoints
    c.train.keep_period = 0  # steps: checkpoints at its multiples stay for ever; 0: none
    # saves in a row that fail (disk full) before the run stops; of several processes, which can only go on together,
    # one stops it
    c.train.max_failed_saves = 3
    c.train.stall_timeout = 600.0  # seconds without progress before the run stops and says where; 0.0: never

    c.eval = ConfigDict()
    c.eval.batch_size = 256  # rows over all devices
    c.eval.max_rows = 0  # held-out rows used, spread evenly; 0: all
    c.eval.mask_rate = 0.15  # the same masks every time, from the seed

    c.finetune = ConfigDict()  # of `evaluate --task=classification` and the like
    c.finetune.method = "full"  # full: all weights; probe: a linear model on the pooled states, the encoder as it is
    c.finetune.pooling = (
        "cls"  # the state of [CLS] (cls) or of the last token (last; for clm), or the mean over the tokens (mean)
    )
    c.finetune.learning_rates = "2e-5,5e-5,1e-4"  # the best on the development set is used; a comma between
    c.finetune.epochs = 3  # at most, see patience
    c.finetune.patience = 2  # epochs without a better score that end a fine-tuning
    c.finetune.batch_size = 32  # texts over all devices
    c.finetune.seeds = 3  # fine-tunings with the best learning rate: their median and spread are reported
    c.finetune.max_length = 128  # tokens; longer texts are cut, the longer of a pair first
    c.finetune.dropout_rate = 0.1  # before the head
    c.finetune.warmup_fraction = 0.06  # of all steps; then linearly to 0
    c.finetune.weight_decay = 0.01  # on matrices and embeddings
    c.finetune.temperature = 0.05  # of the cosines that --task=retrieval learns from
    c.finetune.hard_negatives = 0  # of each query in a batch, drawn from those that the file gives; it may have fewer
    c.finetune.matryoshka_dims = ""  # `32,64`: a vector's first 32 and 64 numbers also learn to do alone (Matryoshka)

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1: all that are left
    c.mesh.fsdp = 1  # devices that split the batch and the parameters
    c.mesh.tensor = 1  # devices that split heads, MLP width and vocabulary

    c.log = ConfigDict()
    c.log.tensorboard = True  # event files in workdir/tensorboard; metrics.jsonl is always written
    c.log.wandb_project = ""  # empty: no Weights & Biases
    return c
