"""The peer of the embedding benchmark: LitServe with sentence-transformers, batched."""

import sys

import litserve
import torch
from sentence_transformers import SentenceTransformer


class Embedder(litserve.LitAPI):
    """As LitServe's own guide batches: up to 32 requests, at most 5 ms apart."""

    def setup(self, device):
        torch.set_num_threads(1)
        self.model = SentenceTransformer(sys.argv[1], device="cpu")

    def decode_request(self, request):
        return request["input"]

    def predict(self, texts):
        return self.model.encode(list(texts), batch_size=32, show_progress_bar=False)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Embedder(max_batch_size=32, batch_timeout=0.005, api_path="/v1/embeddings"),
        accelerator="cpu",
        workers_per_device=1,
    )
    server.run(port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
