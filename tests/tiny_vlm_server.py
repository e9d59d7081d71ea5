"""A real chat-completions server in front of a tiny random Qwen2-VL, for tests and for trying recipes out.

`python tests/tiny_vlm_server.py --port 8000` serves it under http://127.0.0.1:8000/v1 as the model `tiny`. Its letters
are characters; it likes digits, and means nothing by them.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
VOCABULARY = [*SPECIAL, *LETTERS]


class TinyVLM:
    """Tokenizer, picture processor and model; one request at a time."""

    def __init__(self, seed=0):
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        text = {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "bos_token_id": START,
            "eos_token_id": END,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        }
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
        config = Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Qwen2VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                # transformers' 0.02 would make every picture look the same.
                parameter.mul_(5 if parameter.ndim > 1 else 1)
            self.digits = [VOCABULARY.index(str(digit)) for digit in range(10)]
            self.model.lm_head.weight[self.digits] *= 6
        size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
        self.pictures = Qwen2VLImageProcessorPil(patch_size=4, size=size)
        self.lock = threading.Lock()

    def inputs(self, pictures, text):
        """The model's inputs for PIL pictures followed by a text."""
        seen = self.pictures(images=pictures, return_tensors="pt")
        ids, kinds = [START], [0]
        for grid in seen["image_grid_thw"]:
            count = int(grid.prod()) // 4
            ids += [VISION_START, *[IMAGE] * count, VISION_END]
            kinds += [0, *[1] * count, 0]
        letters = [VOCABULARY.index(letter) for letter in text if letter in LETTERS]
        ids, kinds = [*ids, *letters, END, START], [*kinds, *[0] * (len(letters) + 2)]
        return {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([kinds]), **seen}

    @torch.no_grad()
    def generate(self, inputs, max_tokens):
        """Greedy: the tokens, and each one's log-probabilities over the vocabulary."""
        with self.lock:
            told = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=END,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = told.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return new, [logits[0].float().log_softmax(-1) for logits in told.logits]


def complete(vlm, body):
    """A chat completion for a request's body; raises KeyError or ValueError for one that cannot be served."""
    from PIL import Image

    if body["model"] != "tiny":
        raise KeyError(f"the model {body['model']!r} does not exist")
    parts = body["messages"][-1]["content"]
    texts = "".join(part["text"] for part in parts if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("RGB") for url in urls]
    tokens, log_probs = vlm.generate(vlm.inputs(pictures, texts), body.get("max_tokens", 16))
    ended = tokens[-1] == END
    message = {"role": "assistant", "content": "".join(VOCABULARY[token] for token in tokens[: -1 if ended else None])}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if ended else "length", "logprobs": None}
    if body.get("logprobs"):
        top = int(body.get("top_logprobs", 0))
        content = []
        for token, row in zip(tokens, log_probs, strict=True):
            best = row.topk(top).indices.tolist() if top else []
            content.append({**_entry(token, row), "top_logprobs": [_entry(other, row) for other in best]})
        choice["logprobs"] = {"content": content}
    return {"id": "tiny", "object": "chat.completion", "model": "tiny", "choices": [choice]}


def _entry(token, row):
    word = VOCABULARY[token]
    return {"token": word, "logprob": float(row[token]), "bytes": list(word.encode())}


@contextmanager
def serve(vlm, *, key=None, port=0):
    """The server on loopback, for as long as the block lasts; gives its base URL and the bodies it was sent."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
                return self.answer(401, {"error": {"message": f"bad key {self.headers.get('Authorization')}"}})
            if self.path != "/v1/chat/completions":
                return self.answer(404, {"error": {"message": "no such page"}})
            try:
                return self.answer(200, complete(vlm, body))
            except KeyError as error:
                return self.answer(404, {"error": {"message": str(error)}})

        def answer(self, status, value):
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    with serve(TinyVLM(), port=parser.parse_args().port) as (url, _):
        print(f"{url} serves the model 'tiny'; Ctrl-C stops it")
        threading.Event().wait()
