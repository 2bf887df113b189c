"""Damaged folders with safetensors, configurations, tokenizers: an OutpaceError, never anything else, never a hang."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outpace.errors import CorruptModel, ModelError, OutpaceError
from outpace.models.architecture import ARCHITECTURES
from outpace.models.checkpoint import TokenizerFiles
from outpace.models.config import ModelConfig, rope_inv_freq
from outpace.models.safetensors import SafetensorsCheckpoint
from outpace.models.source import resolve
from outpace.models.tokenizer import Tokenizer

fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["\ud800", "\0", "a" * 300, "..", ".", "", "default", "llama3", "BPE", "sliding_attention"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A huge allocation fails instead of passing unseen."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module", params=[1, 3])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model's folder, weights in one file or in three."""
    folder = tmp_path_factory.mktemp("sound") / "m"
    toy_model.write_folder(folder, request.param)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def use(tokenizer: Tokenizer) -> None:
    """What runs do with it."""
    ids = tokenizer.encode("the text, <s> ünd \N{ROCKET}", special=True)
    tokenizer.decode([*ids, 0, 1, 5])
    stream = tokenizer.detokenizer()
    stream.add(ids)
    stream.finish()
    tokenizer.prompt("more")
    tokenizer.same_vocabulary(tokenizer)
    if tokenizer.has_chat_template:
        tokenizer.chat([{"role": "user", "content": "hello <s>"}])
    assert tokenizer.vocabulary is not None


def read_all(folder: Path) -> None:
    source = resolve(str(folder))
    checkpoint = source.checkpoint()
    for kind in set(checkpoint.config.layer_types):
        rope_inv_freq(checkpoint.config, kind)
    for name in checkpoint.names():
        checkpoint.tensor(name)
    use(Tokenizer(checkpoint.tokenizer_files(), checkpoint.config.eos_ids, str(folder)))


def read_damaged(folder: Path) -> None:
    try:
        read_all(folder)
    except OutpaceError as error:
        assert len(str(error)) < 2000
        str(error).encode("utf-8")


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with what is at `path` replaced; left out if `new` is ...."""
    if not path:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def test_sound(sound: dict[str, bytes], tmp_path: Path) -> None:
    read_all(write(tmp_path / "m", sound))


@fuzz
@given(st.data())
def test_values_of_json_changed(sound: dict[str, bytes], tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(set(JSON) & sound.keys())))
    whole = json.loads(sound[name])
    for _ in range(data.draw(st.integers(1, 2))):
        tops = list(paths(whole, ()))
        whole = replaced(whole, data.draw(st.sampled_from(tops)), data.draw(values | st.just(...)))
    read_damaged(write(tmp_path / "m", sound | {name: json.dumps(whole).encode()}))


@fuzz
@given(
    st.sampled_from(sorted(ARCHITECTURES)),
    st.dictionaries(
        st.sampled_from(
            sorted(
                {
                    *toy_model.HF_CONFIG,
                    *(k for a in ARCHITECTURES.values() for k in a.defaults),
                    "layer_types",
                    "rope_parameters",
                    "rope_scaling",
                    "text_config",
                    "hidden_act",
                    "head_dim",
                    "architectures",
                    "quantization_config",
                    "use_sliding_window",
                    "sliding_window",
                }
            )
        ),
        values,
        max_size=4,
    ),
)
def test_configurations(model_type: str, changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_hf(toy_model.HF_CONFIG | {"model_type": model_type} | changes, source="config.json")
    except ModelError as error:
        assert "config.json" in str(error)
        return
    for kind in set(config.layer_types):
        assert len(rope_inv_freq(config, kind)) == config.head_dim // 2


ropes = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"]) | scalars,
        "factor": scalars,
        "rope_theta": scalars,
        "low_freq_factor": scalars,
        "high_freq_factor": scalars,
        "original_max_position_embeddings": scalars,
    },
)


@fuzz
@given(
    st.sampled_from(["llama", "gemma3"]),
    ropes | st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), ropes | scalars),
)
def test_rope_parameters(model_type: str, rope: dict[str, Any]) -> None:
    changes = {"model_type": model_type, "rope_parameters": rope}
    try:
        config = ModelConfig.from_hf(toy_model.HF_CONFIG | changes, source="config.json")
    except ModelError:
        return
    for kind in set(config.layer_types):
        rope_inv_freq(config, kind)


@fuzz
@given(
    which=st.integers(0, 10),
    place=st.floats(0, 1, exclude_max=True),
    header=st.booleans(),
    data=st.binary(min_size=1, max_size=8),
)
def test_bytes_changed(
    sound: dict[str, bytes], tmp_path: Path, which: int, place: float, header: bool, data: bytes
) -> None:
    name = sorted(sound)[which % len(sound)]
    changed = bytearray(sound[name])
    at = int(place * (min(len(changed), 1500) if header else len(changed)))
    changed[at : at + len(data)] = data
    read_damaged(write(tmp_path / "m", sound | {name: bytes(changed)}))


@fuzz
@given(name=st.sampled_from(["model.safetensors", *JSON]), noise=st.binary(max_size=300), header=st.booleans())
def test_noise(sound: dict[str, bytes], tmp_path: Path, name: str, noise: bytes, header: bool) -> None:
    begins = len(noise).to_bytes(8, "little") + b"{" if header and name.endswith(".safetensors") else b""
    read_damaged(write(tmp_path / "m", sound | {name: begins + noise}))


tensor = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "I8", "BOOL", "F8_E4M3", "X"]) | scalars,
        "shape": st.lists(st.sampled_from([0, 1, 32, 2**31, 2**63, 2**64 - 1, -1]), max_size=4) | scalars,
        "data_offsets": st.lists(st.sampled_from([0, 4, 128, 2**40, 2**64 - 1, -1]), max_size=3) | scalars,
    },
)


@fuzz
@given(
    st.dictionaries(st.sampled_from(["model.norm.weight", "__metadata__", "x"]), tensor | scalars, max_size=3),
    st.integers(0, 200) | st.just(2**62),
)
def test_headers(tmp_path: Path, header: dict[str, Any], more: int) -> None:
    toy = tmp_path / "m"
    if not toy.exists():
        toy_model.write_folder(toy)
    text = json.dumps(header).encode()
    (toy / "model.safetensors").write_bytes((len(text) + more * (more > 200)).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(ModelError):
        SafetensorsCheckpoint(toy)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"hidden_size": ' + "9" * 10_000 + "}", '"\\ud800"']
)
@pytest.mark.parametrize("name", JSON)
def test_deep_and_long(sound: dict[str, bytes], tmp_path: Path, name: str, text: str) -> None:
    if name not in sound:
        pytest.skip("weights in one file need no index")
    with pytest.raises(ModelError):
        read_all(write(tmp_path / "m", sound | {name: text.encode()}))


@pytest.mark.parametrize("place", ["..", ".", "", "a/b", "/etc/passwd", "\0", "x" * 300, "\ud800", "config.json"])
def test_names_of_parts(sound: dict[str, bytes], tmp_path: Path, place: str) -> None:
    files = {name: data for name, data in sound.items() if not name.startswith("model")}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"model.norm.weight": place}}).encode()
    with pytest.raises(CorruptModel):
        read_all(write(tmp_path / "m", files))


TOKENIZERS: list[dict[str, Any]] = [
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
    {"type": "WordPiece", "vocab": {}, "unk_token": "?", "continuing_subword_prefix": "#"}
    | {"max_input_chars_per_word": 9},
    {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []},
    {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "?"},
    {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]},
    {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", float("-inf")]]},
]  # fmt: skip


@pytest.mark.parametrize("model", TOKENIZERS)
def test_tokenizers_that_fail_on_a_text_or_have_enormous_ids(model: dict[str, Any]) -> None:
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    with pytest.raises(CorruptModel, match="toy"):
        use(Tokenizer(TokenizerFiles(text, {}), source="toy"))
