"""Encoders against transformers' own classifiers, every row of models.FAMILIES, from their bases to commands.

Bases are small random models saved by transformers' own classes, biases, norms and heads away from their defaults, so
that nothing agrees by being zero. Tolerances are shares of the reference's largest value.
"""

import csv
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_ddp import forked, forks, toy_flags

import bases
import checks
import cli
import configs
import data
import ddp
import files
import foreign
import infer
import labelling
import lora
import model as models
import numerics
import presets
import train
import trained
from errors import UserError
from packed import Batch, pack

pytestmark = forks
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CLOSE = 1e-5  # of the largest value
LENGTHS = (38, 1, 17, 9, 25)  # each fits the tables of 40 positions, together they do not
SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "Bert": dict(max_position_embeddings=40),
    "Roberta": dict(max_position_embeddings=42, pad_token_id=1),  # two rows of its table come before the first token
    "XLMRoberta": dict(max_position_embeddings=42, pad_token_id=1),
    "DistilBert": dict(max_position_embeddings=40),
    "ModernBert": dict(
        num_hidden_layers=3, local_attention=6, global_attn_every_n_layers=3, max_position_embeddings=40
    ),
    "DebertaV2": dict(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, max_position_embeddings=40,
        position_biased_input=False, type_vocab_size=0, norm_rel_ebd="layer_norm", share_att_key=True,
    ),
}  # fmt: skip
POOLINGS = [*((family, "cls") for family in FAMILIES), ("ModernBert", "mean")]
WIDE = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, max_position_embeddings=130)  # for texts
CLASSIFIER = {"classifier.weight", "classifier.bias"}
TWO_LAYERS = {f"classifier.{m}.{t}" for m in ("dense", "out_proj") for t in ("weight", "bias")}
HEADS = {  # family: the names of its head's tensors, and how those of its last layer begin
    "Bert": (CLASSIFIER | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}, "bert.encoder.layer.1."),
    "Roberta": (TWO_LAYERS, "roberta.encoder.layer.1."),
    "XLMRoberta": (TWO_LAYERS, "roberta.encoder.layer.1."),
    "DistilBert": (CLASSIFIER | {"pre_classifier.weight", "pre_classifier.bias"}, "distilbert.transformer.layer.1."),
    "ModernBert": (CLASSIFIER | {"head.dense.weight", "head.norm.weight"}, "model.layers.2."),
    "DebertaV2": (CLASSIFIER | {"pooler.dense.weight", "pooler.dense.bias"}, "deberta.encoder.layer.1."),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family, kind, **changes) -> a folder with a small random model of transformers' class <family><kind>.

    It never changes: a test that spoils a base takes a copy.
    """
    made = {}

    def make(family, kind="ForSequenceClassification", tokenizer=False, **changes):
        key = repr((family, kind, tokenizer, changes))
        if key not in made:
            torch.manual_seed(0)
            sizes = {**SIZES, "num_labels": 3, "pad_token_id": 0, "initializer_range": 0.2, **FAMILIES[family]}
            sizes |= {**(WIDE if tokenizer else {}), **changes}
            model = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**sizes))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.ndim == 1 or name in HEADS[family][0]:
                        p += 0.2 * torch.randn_like(p)
            made[key] = str(tmp_path_factory.mktemp(family))
            model.save_pretrained(made[key])
            if tokenizer:
                transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/base").save_pretrained(made[key])
        return made[key]

    return make


def ours(folder, pooling="cls", classes=3) -> models.Classifier:
    return models.load_classifier(folder, models.Head(classes, pooling), CPU, torch.float32).eval()


def theirs(folder, **options):
    """transformers' own classifier with its default attention: sdpa, and for DeBERTa the only one it has."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def sequences(lengths=LENGTHS, seed=0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 61, n).tolist() for n in lengths]


def batch_of(rows) -> Batch:
    return pack(data.join_tokens(rows), np.arange(len(rows)), CPU)


def padded(model, rows) -> torch.Tensor:
    """Their logits of right-padded rows with an attention mask."""
    longest, value = max(map(len, rows)), model.config.pad_token_id
    ids = torch.tensor([r + [value] * (longest - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return model(input_ids=ids, attention_mask=mask).logits


def alone(model, rows) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([r])).logits for r in rows])


def near(got, want, share=CLOSE):
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.detach().abs().max()))


def as_bin(folder: str, to: Path) -> Path:
    """A copy of a base whose weights are a pickle, as some are published."""
    shutil.copytree(folder, to)
    torch.save(load_file(to / "model.safetensors"), to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


def spoiled(folder: str, to: Path, change) -> Path:
    """A copy of a base whose tensors went through `change(dict)`."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


# ---- packed == padded == alone == transformers' ----------------------------------------------------------------------


def test_every_encoder_of_the_table_is_tested_here():
    """A new row of models.FAMILIES needs its class in FAMILIES, HEADS and TARGETS above."""
    encoders = {name for name, row in models.FAMILIES.items() if row.encoder}
    tested = {getattr(transformers, f"{family}Config").model_type for family in FAMILIES}
    assert tested == encoders, "add a row to FAMILIES and HEADS (and TARGETS) at the top of this file"
    assert FAMILIES.keys() == HEADS.keys() == TARGETS.keys()


@pytest.mark.parametrize("family,pooling", POOLINGS)
def test_packed_logits_equal_theirs_padded_and_alone(base, family, pooling):
    """With the base's own head, of which nothing is drawn anew; the packed row is longer than any table of positions.

    DeBERTa does not take our attention: its row is right-padded inside, with the same result.
    """
    changes = {"classifier_pooling": pooling} if family == "ModernBert" else {}
    folder, rows = base(family, **changes), sequences()
    model, reference = ours(folder, pooling), theirs(folder)
    assert model.fresh == () and type(reference).__name__ == model.architecture == f"{family}ForSequenceClassification"
    assert models.stored_pooling(folder) == pooling
    assert sum(LENGTHS) > reference.config.max_position_embeddings
    packs = model.backbone.config._attn_implementation == models.ATTENTION
    assert packs == model.family.packs == (family != "DebertaV2")
    with torch.no_grad():
        got = model(batch_of(rows))
        near(got, alone(reference, rows))
        near(got, padded(reference, rows))
        near(torch.cat([model(batch_of([row])) for row in rows]), got)
    assert got.dtype == torch.float32 and got.std(0).min() > 1e-3  # the rows differ: no head that ignores its input


@pytest.mark.parametrize("family,pooling", POOLINGS)
def test_packed_gradients_equal_theirs(base, family, pooling):
    """Of every parameter of backbone and head, to 1e-5 of the largest of each."""
    changes = {"classifier_pooling": pooling} if family == "ModernBert" else {}
    folder, rows = base(family, **changes), sequences()
    model, reference = ours(folder, pooling), theirs(folder)
    direction = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(2))
    for logits in (model(batch_of(rows)), padded(reference, rows)):
        (logits * direction).sum().backward()
    want = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in want.values())
    assert got.keys() == want.keys() and HEADS[family][0] <= got.keys()
    for name, gradient in got.items():
        nothing = re.search(r"\.(key|k_lin)\.bias$", name)  # cancels in the softmax
        scale = largest if nothing else float(want[name].abs().max())
        torch.testing.assert_close(gradient, want[name], rtol=0, atol=CLOSE * scale, msg=name)
        assert nothing or gradient.any(), name


def test_the_window_of_modernbert_is_what_the_parity_tests_saw(base):
    """A control: the same weights with a window over everything give other logits, and only for longer texts."""
    folder, rows = base("ModernBert"), sequences((38, 3))
    with torch.no_grad():
        narrow, wide = (alone(theirs(folder, local_attention=n), rows) for n in (6, 200))
        packed = ours(folder)(batch_of(rows))
    assert (narrow - wide)[0].abs().max() > 1e-2
    near(narrow[1], wide[1])
    near(packed, narrow)


def test_a_row_of_roberta_starts_behind_its_padding_position(base):
    """A control: positions from 0 would read other rows of the table, and are the ones BERT reads."""
    model, row = ours(base("Roberta")), sequences((9,))
    assert models.first_position(model.backbone) == 2 and models.first_position(ours(base("Bert")).backbone) == 0
    batch = batch_of(row)
    with torch.no_grad():
        right = model(batch)
        batch.position_ids = batch.position_ids - 2 + 2 * (batch.position_ids < 2)
        assert (model(batch) - right).abs().max() > 1e-2


@pytest.mark.parametrize(
    "family, changes", [*((family, {}) for family in FAMILIES), ("DebertaV2", {"embedding_size": 8})]
)
def test_half_precision_keeps_the_residual_stream_and_the_head_in_fp32(base, family, changes):
    """Under autocast every layer and the head give fp32, while linears compute in bf16; near the fp32 result.

    Also where a linear projects a narrow embedding to the width of the layers.
    """
    folder, rows = base(family, **changes), batch_of(sequences())
    model = ours(folder, models.stored_pooling(folder))
    layers, linears = set(), set()
    for layer in bases.decoder_layers(model.backbone):
        layer.register_forward_hook(lambda m, i, out: layers.add((out[0] if isinstance(out, tuple) else out).dtype))
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, out: linears.add(out.dtype))
    with numerics.autocast(CPU, "bf16"):
        logits = model(rows)
    assert layers == {torch.float32} and torch.bfloat16 in linears and logits.dtype == torch.float32
    near(logits, model(rows), 0.1)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_as_trained_by_others_says_its_pooling(base, pooling):
    """A whole classifier of theirs is read with the pooling that its config names, not with a default."""
    folder, rows = base("ModernBert", classifier_pooling=pooling), sequences()
    with torch.no_grad():
        logits = {how: ours(folder, how)(batch_of(rows)) for how in ("cls", "mean")}
        near(logits[models.stored_pooling(folder)], alone(theirs(folder), rows))
    assert (logits["cls"] - logits["mean"]).abs().max() > 1e-2


# ---- heads that a base does not hold --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,kind,missing",
    [
        ("Bert", "ForMaskedLM", HEADS["Bert"][0]),
        ("Bert", "Model", CLASSIFIER),
        ("Roberta", "ForMaskedLM", HEADS["Roberta"][0]),
        ("XLMRoberta", "ForMaskedLM", HEADS["XLMRoberta"][0]),
        ("DistilBert", "ForMaskedLM", HEADS["DistilBert"][0]),
        ("ModernBert", "ForMaskedLM", CLASSIFIER),  # its masked LM holds the dense layer and the norm of the head
        ("ModernBert", "Model", HEADS["ModernBert"][0]),
        ("DebertaV2", "ForMaskedLM", HEADS["DebertaV2"][0]),
        ("DebertaV2", "Model", HEADS["DebertaV2"][0]),
    ],
)
def test_fresh_names_exactly_what_the_base_does_not_hold(base, family, kind, missing):
    """And what it holds is loaded: every other tensor equals the file's; the drawn ones follow from the seed."""
    folder = base(family, kind)
    stored = load_file(Path(folder) / "model.safetensors")
    model = ours(folder)
    assert set(model.fresh) == missing and len(model.fresh) == len(missing)
    for name, p in model.named_parameters():
        if name not in missing:
            key = next(k for k in (name, name.removeprefix(f"{model.prefix}.")) if k in stored)
            assert torch.equal(p, stored[key]), name
    again, other = ours(folder), models.load_classifier(folder, models.Head(3, "cls"), CPU, torch.float32, seed=7)
    for name in missing:
        assert torch.equal(again.get_parameter(name), model.get_parameter(name)), name
    changed = {n for n in missing if not torch.equal(other.get_parameter(n), model.get_parameter(n))}
    assert changed == {n for n in missing if n.endswith("weight") and "norm" not in n}


@pytest.mark.parametrize(
    "family,last",
    [
        ("Bert", CLASSIFIER),
        ("Roberta", {"classifier.out_proj.weight", "classifier.out_proj.bias"}),
        ("DistilBert", CLASSIFIER),
        ("ModernBert", CLASSIFIER),
        ("DebertaV2", CLASSIFIER),
    ],
)
def test_another_number_of_labels_draws_a_fresh_output_layer(base, family, last):
    """A base that classifies into 3 serves for 5: only its last layer is drawn, nothing is refused."""
    model = ours(base(family), classes=5)
    assert set(model.fresh) == last and model.outputs == 5
    assert model(batch_of(sequences())).shape == (len(LENGTHS), 5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["missing", "misshapen"])
def test_a_base_with_a_spoiled_backbone_is_refused(base, tmp_path, family, how):
    """A tensor of the backbone is never drawn in silence, as one of the head is: the message names it."""
    pattern = re.compile(r"layers?\.1\..*(Wo|output\.dense|ffn\.lin2)\.weight$")

    def change(tensors):
        name = next(n for n in tensors if pattern.search(n))
        spoilt.append(name)
        tensor = tensors.pop(name)
        if how == "misshapen":
            tensors[name] = tensor[:-1].contiguous()

    spoilt = []
    folder = spoiled(base(family), tmp_path / "spoiled", change)
    with pytest.raises(UserError, match="1 tensors are missing from its weights or misshapen") as error:
        ours(folder)
    assert spoilt[0] in str(error.value)
    ours(base(family))


TARGETS = dict.fromkeys(FAMILIES, "query,value")
TARGETS |= {"DistilBert": "q_lin,v_lin", "ModernBert": "Wqkv", "DebertaV2": "query_proj,value_proj"}


@pytest.mark.parametrize("family,kind", [(f, "ForMaskedLM") for f in FAMILIES] + [("Bert", "Model")])
def test_lora_trains_and_saves_exactly_the_fresh_head_whole(base, tmp_path, family, kind, capsys):
    """Beside its updates; and the saved run gives the same logits again, in this project and in peft."""
    from peft import AutoPeftModelForSequenceClassification

    folder, fresh = base(family, kind, tokenizer=True), HEADS[family][0]
    whole = CLASSIFIER if kind == "Model" or family == "ModernBert" else fresh
    flags = toy_flags(tmp_path, folder, pooling="cls", targets=TARGETS[family], max_steps=4, eval_every=2, lr=1e-2)
    run = Path(train.main(flags)["run"])
    names = [n for n, _ in theirs(folder).named_modules() if n.rsplit(".", 1)[-1] in TARGETS[family].split(",")]
    assert len(names) == {"ModernBert": 3}.get(family, 4)
    keys = {f"{n}.lora_{side}.weight" for n in names for side in "AB"} | whole
    saved = load_file(run / "best/adapter_model.safetensors")
    assert saved.keys() == {f"base_model.model.{k}" for k in keys}

    cfg, labels = trained.run_facts(run)
    tokenizer = bases.load_tokenizer(folder)
    start = trained.new_classifier(cfg, labels, tokenizer, CPU, "fp32")
    assert {n for n, p in start.named_parameters() if p.requires_grad} == keys
    for name in whole:
        assert not torch.equal(saved[f"base_model.model.{name}"], start.get_parameter(name)), name

    rows = files.read_rows(str(tmp_path / "val.csv"), "val_data")
    logits, _ = trained.load_run(run).logits(rows, cfg.max_tokens)
    with open(run / "val_predictions.csv", newline="") as f:
        live = np.array([[float(line[f"logit_{c}"]) for c in range(8)] for line in csv.DictReader(f)], np.float32)
    assert np.array_equal(logits, live)
    options = {"num_labels": 8}
    if family == "ModernBert":
        options["classifier_pooling"] = "cls"
    peft = AutoPeftModelForSequenceClassification.from_pretrained(run / "best", **options).eval()
    with torch.no_grad():
        found = [peft(input_ids=torch.tensor([tokenizer(r["Question"])["input_ids"][:64]])).logits for r in rows[:6]]
    near(torch.from_numpy(logits[:6]), torch.cat(found))
    given = configs.InferConfig(base=folder, adapter=str(run / "best"), max_length=64)
    again = foreign.load_given(foreign.given_model(given), ddp.setup())
    assert (
        np.array_equal(again.logits(rows, cfg.max_tokens)[0], logits)
        and f"{len(keys)} tensors matched" in capsys.readouterr().out
    )


# ---- bases that are pickles -----------------------------------------------------------------------------------------


def test_a_base_published_only_as_bin_loads(base, tmp_path):
    """DeBERTa-v3 and MathBERT are: the same weights, the same logits."""
    folder, rows = base("DebertaV2"), sequences()
    only = as_bin(folder, tmp_path / "bin")
    assert not list(only.glob("*.safetensors"))
    with torch.no_grad():
        assert torch.equal(ours(only)(batch_of(rows)), ours(folder)(batch_of(rows)))
    assert ours(only).fresh == ()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_refused_and_does_not_run(base, tmp_path):
    """As a base of train.py and of infer.py: one line, status 2, and its command never ran."""
    folder, marker = as_bin(base("DebertaV2", tokenizer=True), tmp_path / "evil"), tmp_path / "marker"
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "extra": Evil(marker)}, folder / "pytorch_model.bin")
    flags = toy_flags(tmp_path, str(folder), pooling="cls", targets="query_proj")
    classify = ["--base", folder, "--input", tmp_path / "val.csv", "--output", tmp_path / "o.csv"]
    for main, given in ((train.main, flags), (infer.main, classify)):
        status, out, err = forked(main, given, tmp_path)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert "its weights cannot be loaded" in err and not marker.exists()
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "o.csv").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the pickle is what it claims to be
    assert marker.exists()


# ---- structure, checked before weights are loaded -------------------------------------------------------------------


def unreadable(folder: str, to: Path) -> str:
    """A copy of a base whose weights are too few to be loaded: what is refused there was refused without them."""
    shutil.copytree(folder, to)
    save_file({"none.weight": torch.zeros(1)}, to / "model.safetensors")
    return str(to)


@pytest.mark.parametrize("family,most", [("Bert", 130), ("Roberta", 128)])
def test_more_tokens_than_positions_are_refused_before_weights_are_loaded(base, tmp_path, family, most):
    """RoBERTa's first two rows are no positions of tokens. One token fewer is accepted and computed."""
    folder = unreadable(base(family, tokenizer=True), tmp_path / "base")
    flags = {"pooling": "cls", "targets": "query", "max_tokens": 512}
    with pytest.raises(UserError, match=f"--max_length {most + 1}: this base has positions for {most} tokens"):
        train.main(toy_flags(tmp_path, folder, **flags, max_length=most + 1))
    with pytest.raises(UserError, match="missing from its weights"):
        train.main(toy_flags(tmp_path, folder, **flags, max_length=most))
    with pytest.raises(UserError, match=f"positions for {most} tokens"):
        infer.main(["--base", folder, "--input", str(tmp_path / "val.csv"), "--max_length", str(most + 1)])
    model = ours(base(family, tokenizer=True))
    with torch.no_grad():
        assert model(batch_of(sequences((most,)))).isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(batch_of(sequences((most + 1,))))


def test_relative_positions_have_no_end(base, tmp_path):
    """DeBERTa-v3 takes rows beyond max_position_embeddings; one with a table does not, nor rotary positions, which were
    trained up to there.
    """
    flags = {"pooling": "cls", "max_length": 400, "max_tokens": 512, "dry_run": "true"}
    folder = base("DebertaV2", tokenizer=True)
    assert bases.load_config(folder).max_position_embeddings < 400
    assert train.main(toy_flags(tmp_path, folder, **flags, targets=TARGETS["DebertaV2"]))["dry_run"]
    rotary = unreadable(base("ModernBert", tokenizer=True), tmp_path / "rotary")
    most = bases.load_config(rotary).max_position_embeddings
    with pytest.raises(UserError, match=f"--max_length 400: .* was made for {most} positions; lower it"):
        train.main(toy_flags(tmp_path, rotary, **flags, targets=TARGETS["ModernBert"]))
    rows, folder = sequences((150, 4)), base("DebertaV2")
    with torch.no_grad():
        near(ours(folder)(batch_of(rows)), alone(theirs(folder), rows))
    table = base("DebertaV2", tokenizer=True, position_biased_input=True)
    with pytest.raises(UserError, match="positions for 130 tokens"):
        train.main(toy_flags(tmp_path, table, **flags, targets="query_proj"))
    rows, table = sequences(), base("DebertaV2", position_biased_input=True)
    with torch.no_grad():
        near(ours(table)(batch_of(rows)), alone(theirs(table), rows))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 1, -1])
def test_rank_0_trains_exactly_those_layers(base, tmp_path, family, count):
    """0: the head alone; 1: the last layer, the final norm and the head; -1: everything. All else stays as it was."""
    folder, (head, layer) = base(family, tokenizer=True), HEADS[family]
    before = theirs(folder, num_labels=8, ignore_mismatched_sizes=True).state_dict()
    last = {n for n in before if n.startswith(layer)} | ({"model.final_norm.weight"} & before.keys())
    expected = {0: head, 1: head | last, -1: before.keys()}[count]
    assert len(last) > 5 and head < before.keys()
    cfg = configs.TrainConfig(base=folder, rank=0, train_layers=count, pooling="cls")
    names = tuple(str(i) for i in range(8))
    model = trained.new_classifier(cfg, labelling.Labels(names, names), bases.load_tokenizer(folder), CPU, "fp32")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    if count == -1:
        return
    settings = {"rank": 0, "train_layers": count, "pooling": "cls", "max_steps": 3, "eval_every": 3, "lr": 1e-2}
    flags = toy_flags(tmp_path, folder, **settings, alpha=None, lora_dropout=None)
    after = load_file(Path(train.main(flags)["run"]) / "best/model.safetensors")
    moved = {n for n in after if n in before and not torch.equal(after[n], before[n])}
    assert after.keys() == before.keys() and moved == expected


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_an_encoder_of_another_family_is_refused_with_the_known_ones(tmp_path, pooling):
    """A head of another kind would be computed wrongly."""
    config = transformers.ElectraConfig(**{**SIZES, "vocab_size": 4096, "embedding_size": 24})
    folder = tmp_path / "base"
    transformers.ElectraForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/base").save_pretrained(folder)
    flags = toy_flags(tmp_path, unreadable(folder, tmp_path / "copy"), pooling=pooling, targets="query")
    known = ", ".join(models.FAMILIES)
    with pytest.raises(UserError, match=f"electra: .*as those of {known} are"):
        train.main(flags)


# ---- the user's commands --------------------------------------------------------------------------------------------

FEW = {"max_steps": 3, "max_length": 128, "max_tokens": 512, "eval_rows": 40, "val_size": 60, "batch_size": 8}


def train_and_infer(tmp_path, base, rows, flags, predict) -> tuple[Path, dict, list[dict]]:
    """The two commands; returns the run, what training printed last, and the predictions of 20 rows."""
    settings = {"base": base, "train_data": rows, "outputs": tmp_path / "outputs", **FEW, **flags}
    status, out, err = forked(train.main, [str(x) for n, v in settings.items() for x in (f"--{n}", v)], tmp_path)
    assert status == 0, out + err
    result = json.loads(out.strip().splitlines()[-1])
    assert result["steps"] == 3 and result["metrics"]["rows"] == 60
    log = [json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval"]["rows"] for line in log if "eval" in line] == [40]
    assert len({line["loss"] for line in log if "loss" in line}) == 3
    output = tmp_path / "predictions.csv"
    given = ["--runs", result["run"], "--input", predict, "--limit", "20", "--output", output, "--submission", ""]
    status, out, err = forked(infer.main, given, tmp_path)
    assert status == 0, out + err
    assert json.loads(out.strip().splitlines()[-1])["rows"] == 20
    with open(output, newline="") as f:
        return Path(result["run"]), result, list(csv.DictReader(f))


def moved_tensors(folder, saved: dict[str, torch.Tensor]) -> set[str]:
    """Names of a whole save's tensors that are not those of the base."""
    stored = load_file(folder) if Path(folder).suffix == ".safetensors" else torch.load(folder, weights_only=True)
    return {n for n, t in saved.items() if n not in stored or not torch.equal(t, stored[n])}


def test_modernbert_trains_whole_from_the_command_line(base, shared, tmp_path):
    """The save is a model of transformers': it gives the predictions that infer.py wrote."""
    folder, problems = base("ModernBert", "ForMaskedLM", tokenizer=True), shared / "data/math_problems"
    flags = {"rank": 0, "pooling": "mean"}
    run, result, rows = train_and_infer(tmp_path, folder, problems / "train.csv", flags, problems / "test.csv")
    saved = load_file(run / "best/model.safetensors")
    assert moved_tensors(f"{folder}/model.safetensors", saved) == saved.keys() == theirs(folder).state_dict().keys()
    reference, tokenizer = theirs(run / "best"), transformers.AutoTokenizer.from_pretrained(run / "best")
    assert reference.config.classifier_pooling == "mean"
    decision = trained.read_decision(run, "single_label", 8)
    given = files.read_rows(str(problems / "test.csv"), "input")[:20]
    files.decode_bytes_literals(given, ["Question"])
    texts = [r["Question"] for r in given]
    short = [i for i, t in enumerate(texts) if len(tokenizer(t)["input_ids"]) <= 128]
    assert len(short) > 5
    for i in short:
        with torch.no_grad():
            logits = reference(**tokenizer(texts[i], return_tensors="pt")).logits[0]
        shares = torch.tensor([float(rows[i][f"probability_{c}"]) for c in range(8)])
        near(shares, (logits / decision.temperature).softmax(0))


def test_bert_trains_with_lora_on_every_linear_from_the_command_line(base, shared, tmp_path):
    folder, problems = base("Bert", "Model", tokenizer=True), shared / "data/math_problems"
    flags = {"rank": 4, "alpha": 12, "targets": "all-linear", "pooling": "cls"}
    run, result, rows = train_and_infer(tmp_path, folder, problems / "train.csv", flags, problems / "test.csv")
    linears = [n for n, m in theirs(folder).named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"]
    keys = {f"{n}.lora_{side}.weight" for n in linears for side in "AB"} | CLASSIFIER
    assert len(linears) == 2 * 6 + 1  # query, key, value, three dense layers; the pooler
    saved = load_file(run / "best/adapter_model.safetensors")
    assert saved.keys() == {f"base_model.model.{k}" for k in keys} and all(t.any() for t in saved.values())
    assert {r["prediction"] for r in rows} <= {str(i) for i in range(8)}


def test_deberta_trains_its_last_layer_from_the_command_line(base, shared, tmp_path):
    """From a base that is published as a pickle, as DeBERTa-v3 is; the run itself is safetensors."""
    folder = as_bin(base("DebertaV2", "ForMaskedLM", tokenizer=True), tmp_path / "bin")
    problems, (head, layer) = shared / "data/math_problems", HEADS["DebertaV2"]
    flags = {"rank": 0, "train_layers": 1, "pooling": "cls"}
    run, result, rows = train_and_infer(tmp_path, folder, problems / "train.csv", flags, problems / "test.csv")
    saved = load_file(run / "best/model.safetensors")
    moved = moved_tensors(folder / "pytorch_model.bin", saved)
    assert moved == head | {n for n in saved if n.startswith(layer)} and len(moved) > 10
    assert not list(run.rglob("*.bin")) and {r["prediction"] for r in rows} <= {str(i) for i in range(8)}


def test_deberta_regresses_from_the_command_line(base, shared, tmp_path):
    """The published recipe at toy size: one output, squared error, the AUC of raw outputs."""
    folder = as_bin(base("DebertaV2", "ForMaskedLM", tokenizer=True), tmp_path / "bin")
    rules = shared / "data/reddit_rules"
    flags = {"task": "regression", "metric": "roc_auc", "rank": 0, "pooling": "cls", "lr": "2e-4"}
    flags |= {"text": "Rule: {rule}\nPost: {body}", "label_column": "rule_violation", "id_column": "row_id"}
    run, result, rows = train_and_infer(tmp_path, folder, rules / "train.csv", flags, rules / "train.csv")
    assert result["metrics"].keys() >= {"mse", "rmse", "mae", "roc_auc"} and 0 < result["metrics"]["roc_auc"] < 1
    assert list(rows[0]) == ["row_id", "prediction"] and len({r["prediction"] for r in rows}) == 20
    with open(run / "val_predictions.csv", newline="") as f:
        held_out = list(csv.DictReader(f))
    share = np.mean([float(r["label"]) for r in held_out])
    everything = np.mean([float(r["rule_violation"]) for r in files.read_rows(str(rules / "train.csv"), "input")])
    assert len(held_out) == 60 and abs(share - everything) < 1 / 60  # stratified


# ---- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,base,expected",
    [
        ("mathbert", "tbs17/MathBERT", {"pooling": "cls", "epochs": 5}),
        ("modernbert_base", "answerdotai/ModernBERT-base", {"epochs": 5}),
        ("modernbert_large", "answerdotai/ModernBERT-large", {"epochs": 5}),
        ("deberta_base", "microsoft/deberta-v3-base", {"pooling": "cls"}),
        ("deberta_large", "microsoft/deberta-v3-large", {"pooling": "cls"}),
        ("roberta_large", "roberta-large", {"pooling": "cls"}),
    ],
)
def test_presets_hold_the_published_recipes(name, base, expected):
    """The table of the design, and each passes every check once the user's rows are named."""
    cfg, given = cli.parse(configs.TrainConfig, presets.TRAIN_PRESETS, ["--cfg", name, "--train_data", "mine.csv"])
    cfg = checks.own_data(cfg, given)
    checks.check(cfg, given)
    assert cfg.base.removeprefix("FacebookAI/") == base and cfg.train_data == "mine.csv" and cfg.test_data == ""
    expected = {"lr": 2e-5, "batch_size": 16, "rank": 0, "train_layers": -1, **expected}
    if "bert" in name and name.startswith(("math", "modern")):
        expected |= {"task": "single_label", "metric": "micro_f1"}
    else:
        expected |= {"task": "regression", "metric": "roc_auc", "epochs": 3, "warmup_ratio": 0.1, "weight_decay": 0.01}
        expected |= {"max_length": 512, "eval_every": 0}  # evaluation each epoch
        assert "{rule}" in cfg.text and "{body}" in cfg.text and cfg.label_column == "rule_violation"
    assert {n: getattr(cfg, n) for n in expected} == expected
    assert cfg.pooling in (("cls", "mean") if "modern" in name else ("cls",))


def test_adapters_name_the_modules_of_encoders(base):
    """A target that does not exist in the family is refused with what there is."""
    bare = models.skeleton(base("DebertaV2"), models.Head(3, "cls"))
    with pytest.raises(ValueError, match="target query matches no module.*query_proj"):
        lora.inject(bare, lora.Adapter(("query",), 4, 12.0))


def test_a_target_within_a_head_that_is_trained_whole_is_refused(base, tmp_path):
    """A masked LM of BERT holds no pooler: it is trained whole, and no adapter is left to train."""
    flags = toy_flags(tmp_path, base("Bert", "ForMaskedLM", tokenizer=True), pooling="cls", targets="pooler.dense")
    with pytest.raises(UserError, match="--targets pooler.dense: "):
        train.main(flags)


def test_a_tokenizer_that_is_a_sentencepiece_model_says_what_to_install(tmp_path):
    """DeBERTa-v3 is published so; its fast form is made by packages that are not among the six."""
    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    transformers.DebertaV2Config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm"}')
    (tmp_path / "spm.model").write_bytes(bytes(range(1, 200)))
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        bases.load_tokenizer(str(tmp_path))
