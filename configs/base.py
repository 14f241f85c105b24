"""Every config field with its default, and its unit or its effect. The other configs are short diffs of this one.

The types and the allowed values are in flax_mlm/config/schema.py. No lists and no bare None here: optional values are
placeholders, spelled `none` on the command line. Floats are written as floats. A comment stands directly above its
field or behind it.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # determines the initial parameters, the data order, the masks and dropout
    # Hugging Face folder or hf:ORG/NAME[@revision], a model of the Hub, to start from (docs/how-to/huggingface.md lists
    # the kinds); it sets the model's shape
    c.init_from = ""
    c.reinit_head = False  # with init_from: initialise a new vocabulary head, for folders without one

    c.data = ConfigDict()
    # builtin | text:GLOB | text:GLOB#file (a file is a document) | lines:GLOB | jsonl:GLOB#field | csv:GLOB#column |
    # tsv:GLOB#column | parquet:GLOB#column | arrow:GLOB#column | fasta:GLOB | symbols:GLOB (a sequence a line) |
    # ids:GLOB (ids of tokenizer.path) | wikiextractor:GLOB | tfds:NAME[/config][:version][:split] |
    # hf:ORG/NAME?config=...&split=...&revision=...#column | hf:FOLDER#column (a folder made by save_to_disk);
    # or several, joined by | in order. A field may be nested (a.b), or a template of several: '#{title}\n{text}'.
    c.data.source = "builtin"
    c.data.encoding = "utf-8"  # of text without a byte-order mark: a name that Python knows, such as latin1 or gb18030
    # Documents that are dropped: none | exact (copies of an earlier one) | near (also those that are similar to one)
    c.data.dedup = "none"
    c.data.dedup_threshold = 0.8  # near: Jaccard similarity of n-grams of five words from which documents are similar
    # Evaluation files, "data/glue/*.tsv,test.jsonl": documents that share 13 words in a row with them are dropped
    c.data.decontaminate = ""
    # A folder made by `prepare`, or several with weights ("wiki:0.7,books:0.3"; without weights: see sampling_alpha);
    # patterns ("corpora/*") stand for the corpora that match. It determines seq_len; source, packing and
    # validation_fraction are unused then; tokenizer.path is optional.
    c.data.corpus = ""
    # corpora without weights are read in proportion to rows ** alpha: at 1.0 in proportion to their rows, below more of
    # the small ones; also the sources of `prepare --tokenizer_only`, by their bytes
    c.data.sampling_alpha = 1.0
    c.data.cache_dir = "~/.cache/flax_mlm"  # where `train` keeps the corpora that it prepares itself
    c.data.seq_len = 128  # L, tokens per row, including [CLS] and [SEP]
    c.data.validation_fraction = 0.05  # of the documents, held out by a hash of their text
    c.data.packing = "best_fit"  # best_fit (least padding) | sequential (keeps the order of documents)
    c.data.num_workers = 0  # processes of `prepare`; 0: one per core. The corpus does not depend on it

    c.tokenizer = ConfigDict()
    # SentencePiece .model, Hugging Face tokenizer.json, WordPiece vocab.txt, a folder of one, or a model of the Hub,
    # hf:ORG/NAME[@revision]; empty: train a SentencePiece model
    c.tokenizer.path = ""
    c.tokenizer.extra_tokens_file = ""  # file of words, one per line, to add to the vocabulary of tokenizer.path
    # bpe (converts exactly to tokenizer.json) | unigram | symbols (single characters, or what whitespace separates)
    c.tokenizer.model_type = "bpe"
    c.tokenizer.vocab_size = 8192  # V, including special tokens and 256 byte tokens; of symbols: at most
    c.tokenizer.normalization = "nmt_nfkc"  # nmt_nfkc | nmt_nfkc_cf (also lower-cases) | identity
    c.tokenizer.character_coverage = 0.9995  # fraction of characters with tokens of their own; others become bytes
    c.tokenizer.sample_bytes = 50_000_000  # text to train the tokenizer on, sampled evenly from the training documents

    c.model = ConfigDict()
    c.model.num_layers = 4  # N
    c.model.hidden_size = 256  # D
    c.model.num_heads = 4  # H, divides hidden_size
    c.model.intermediate_size = 1024  # width of the MLP; with glu, of each of its two projections
    c.model.max_positions = 512  # longest row that the encoder accepts
    c.model.position_embedding = "learned"  # learned | rope
    c.model.norm_position = "post"  # post (BERT) | pre (ModernBERT; adds a final norm)
    c.model.norm_eps = 1e-12  # added to the variance in layer norms
    c.model.use_bias = True  # biases in projections and norms
    c.model.glu = False  # gated MLP (GeGLU)
    c.model.activation = "gelu"  # gelu | gelu_tanh (its approximation by tanh, as in ALBERT v2)
    c.model.type_vocab_size = 2  # token-type embeddings; 0: none
    c.model.embedding_size = 0  # E, width of the embeddings, projected to hidden_size (ALBERT); 0: hidden_size
    c.model.share_layers = False  # all layers use the same weights (ALBERT)
    # every n-th layer attends to the whole segment, the others to a window of sliding_window tokens; 1: all layers are
    # global
    c.model.global_attn_every_n_layers = 1
    c.model.sliding_window = 128  # tokens in the window of a local layer, half on each side
    # xla | splash (TPU kernel) | cudnn (GPU kernel) | auto (a kernel if attention_dropout_rate is 0 and rows have at
    # least 512 tokens on TPU or 128 on GPU)
    c.model.attention = "auto"
    c.model.rope_theta_global = 10_000.0  # RoPE base of global layers
    c.model.rope_theta_local = 10_000.0  # RoPE base of local layers
    c.model.dropout_rate = 0.1  # on embeddings, attention output and MLP output
    c.model.attention_dropout_rate = 0.1  # on attention probabilities
    c.model.initializer_range = 0.02  # standard deviation of the initial weights
    c.model.vocab_multiple_of = 1  # round the embedding's rows up to a multiple; 128 suits TPUs and tensor parallelism
    c.model.dtype = "float32"  # of the computation: float32 | bfloat16; parameters are always float32
    # True: scan one compiled layer; False: unroll the layers, faster on CPU and GPU but slower to compile; none: unroll
    # up to 12 layers on CPU, up to 24 on GPU without fsdp, otherwise scan
    c.model.scan_layers = placeholder(bool)
    # activations kept for the backward pass: none (all are kept) | dots (matmul outputs) | full (layer inputs)
    c.model.remat = "none"

    c.objective = ConfigDict()
    # mlm | clm (next token, causal attention, same rows in the same order) | rtd (replaced-token detection, ELECTRA)
    c.objective.name = "mlm"
    c.objective.masking = "token"  # token | whole_word | span
    c.objective.mask_rate = 0.15  # fraction of each row's ordinary tokens that is predicted
    c.objective.mask_replace_prob = 0.8  # fraction of the predicted tokens that is replaced by [MASK]
    c.objective.random_replace_prob = 0.1  # fraction replaced by a random token; the rest stays unchanged
    c.objective.span_stop = 0.2  # probability that a span ends after a word (SpanBERT)
    c.objective.span_max_words = 10  # longest span
    c.objective.attend_across_documents = False  # attention and positions span the whole row, not one document
    # z-loss coefficient on (log Z)²; 1e-4 in PaLM; 0.0 disables. Logged as z_loss; `loss` stays the cross-entropy
    c.objective.z_loss = 0.0
    c.objective.generator_size = 0.25  # rtd: the generator's fraction of the encoder's heads, width and MLP width
    c.objective.generator_depth = 1.0  # rtd: the generator's fraction of the encoder's layers
    # rtd: none | shared (ELECTRA) | gradient_disentangled (the encoder adds to the generator's embeddings without
    # sending gradients to them; DeBERTaV3)
    c.objective.embedding_sharing = "gradient_disentangled"
    c.objective.discriminator_weight = 50.0  # rtd: weight of the encoder's mean loss, relative to the generator's

    c.optimizer = ConfigDict()
    # adamw | stable_adamw (clips each tensor's update when gradients grow suddenly; max_grad_norm may be 0) |
    # schedule_free (AdamW at a constant rate; a weight average replaces the decay and is evaluated) | lamb |
    # muon (Muon for matrices, AdamW for embeddings, norms and biases)
    c.optimizer.name = "adamw"
    # peak learning rate; muon is stable at several times AdamW's: configs/small.py uses 6e-3
    c.optimizer.learning_rate = 5e-4
    c.optimizer.schedule = "linear"  # linear | cosine | wsd (warm-up, stable, decay) | constant
    c.optimizer.warmup_fraction = 0.05  # fraction of the run; a phase that sets it, or warmup_steps, warms up again
    c.optimizer.warmup_steps = 0  # instead of warmup_fraction, so that a longer run warms up alike; 0: unused
    # steps at the beginning in which the vocabulary head alone is trained, so that a new one (reinit_head) does not
    # disturb an encoder that knows something; 0: none
    c.optimizer.head_first_steps = 0
    c.optimizer.head_rate_factor = 1.0  # learning rate of the vocabulary head, relative to that of the encoder
    c.optimizer.decay_fraction = 0.2  # fraction of the run, at its end; wsd only
    c.optimizer.final_lr_fraction = 0.0  # of the peak, at the last step; unused with constant
    c.optimizer.beta1 = 0.9  # of Adam, and schedule-free's interpolation; Muon's momentum is 0.95
    c.optimizer.beta2 = 0.98  # of Adam
    c.optimizer.eps = 1e-6  # of Adam
    c.optimizer.weight_decay = 0.01  # on matrices and embeddings, not on norms and biases
    c.optimizer.max_grad_norm = 1.0  # clip to this global norm; 0.0: no clipping
    c.optimizer.max_skipped_steps = 10  # stop after this many skipped updates in a row (not finite, or a spike)
    c.optimizer.spike_action = "none"  # none | clip (ZClip) | skip (the update)
    c.optimizer.spike_threshold = 4.0  # z-score of loss or gradient norm that counts as a spike; 2.5 in ZClip
    # none | ema | lawa: keep an average of the weights (4 bytes a parameter) that is evaluated, exported and fine-tuned
    # instead of them; `evaluate --config.optimizer.averaging=none` evaluates the last weights
    c.optimizer.averaging = "none"
    c.optimizer.ema_decay = 0.999  # per step; (1 + step) / (10 + step) while that is less
    c.optimizer.lawa_every = 200  # steps between snapshots, counted back from the last step
    c.optimizer.lawa_count = 5  # snapshots in the final average; fewer during the run

    c.train = ConfigDict()
    c.train.steps = 10_000  # length of the run, unless train.tokens or train.budget_minutes is set
    c.train.tokens = 0.0  # length of the run in tokens, without special tokens and padding; 0.0: unused
    # length of the run in minutes of wall-clock time over all restarts, including compilation, evaluations and the last
    # checkpoint; 0.0: unused
    c.train.budget_minutes = 0.0
    # changes during the run, each from a percentage of it on, or from a step (token, minute):
    # `0%: objective.mask_rate=0.3->0.15; 90%: data.seq_len=512, train.global_batch_size=64`; see
    # docs/how-to/phases-and-budgets.md
    c.train.phases = ""
    c.train.global_batch_size = 256  # B, rows per step over all devices
    c.train.gradient_accumulation_steps = 1  # split each batch into this many parts to save memory
    c.train.logits_chunks = 1  # compute logits in N chunks to save memory (mlm, clm)
    # the same parameters, bit for bit, on every number of devices that divides batch_groups; slower
    c.train.reproducible = False
    c.train.batch_groups = 8  # reproducible: groups of rows whose gradients are summed in a fixed order
    c.train.log_every = 20  # steps
    c.train.eval_every = 1000  # steps; 0: only at the end
    c.train.cloze_every = 0  # steps between evaluations of the built-in clozes; 0: never
    c.train.checkpoint_every = 1000  # steps; the last step is always saved
    c.train.max_to_keep = 2  # newest checkpoints to keep
    c.train.keep_period = 0  # steps; a multiple of checkpoint_every, whose checkpoints are kept forever; 0: none
    c.train.max_failed_saves = 3  # failed saves in a row (disk full) before the run stops; 1 with several processes
    c.train.stall_timeout = 600.0  # seconds without progress before the run stops with an error; 0.0: never

    c.eval = ConfigDict()
    c.eval.batch_size = 256  # rows over all devices
    c.eval.max_rows = 0  # held-out rows to use, sampled evenly; 0: all
    c.eval.mask_rate = 0.15  # the masks are the same in every evaluation

    c.finetune = ConfigDict()  # used by `evaluate --task=classification`, tagging and retrieval
    c.finetune.method = "full"  # full (all weights) | probe (a linear model on the frozen encoder's pooled states)
    c.finetune.pooling = "cls"  # a text's vector: the state of [CLS] (cls), of the last token (last; for clm), or mean
    c.finetune.head = "auto"  # auto (that of the model's class in transformers, where it has this pooling) | linear
    c.finetune.class_weights = ""  # balanced: by inverse frequency; or label=weight,...; empty: all alike
    c.finetune.learning_rates = ""  # comma-separated; empty: 2e-5,5e-5,1e-4 if hidden_size >= 512, else 1e-4,3e-4,1e-3
    c.finetune.epochs = 3  # at most, see patience
    c.finetune.patience = 2  # stop after this many epochs without a better score
    c.finetune.batch_size = 32  # texts over all devices
    c.finetune.seeds = 3  # runs with the best learning rate; their median and spread are reported
    c.finetune.max_length = 128  # tokens; longer texts are truncated, the longer of a pair first
    c.finetune.prompt = ""  # put before every text whose vector is computed, such as "query: "
    c.finetune.dropout_rate = 0.1  # before the head
    c.finetune.warmup_fraction = 0.06  # of all steps; then linear decay to 0
    c.finetune.weight_decay = 0.01  # on matrices and embeddings
    c.finetune.temperature = 0.05  # of the cosine similarities in the contrastive loss (--task=retrieval)
    c.finetune.hard_negatives = 0  # per query in a batch, drawn from those in the file
    c.finetune.matryoshka_dims = ""  # `32,64`: train the first 32 and 64 dimensions to work alone (Matryoshka)

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1: all remaining devices
    c.mesh.fsdp = 1  # devices that split the batch and the parameters
    c.mesh.tensor = 1  # devices that split heads, MLP width and vocabulary

    c.log = ConfigDict()
    c.log.tensorboard = True  # write event files to WORKDIR/tensorboard, in addition to metrics.jsonl
    c.log.wandb_project = ""  # Weights & Biases project; empty: none
    return c
