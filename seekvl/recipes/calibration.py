"""Questions about pictures, and what a model answers to them: what `weights.calibrate` rounds it by.

    drawn      pictures of seekvl's own corpus, a question of each kind in turn
    a folder   its pictures; beside a.png may lie a.txt with the question, else one of `QUESTIONS` is asked

The questions matter less than that pictures stand among the words: their rows are unlike those of tokens, and
a prompt is mostly made of them.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from seekvl.corpus.nano import KINDS, sample
from seekvl.engine.forward import embed_prompt
from seekvl.processing.conversation import Conversation
from seekvl.recipes.answer_file import SUFFIXES
from seekvl.runtime import SeekVLError, is_whole
from seekvl.vlm import VLM, Answer, user_message
from seekvl.weights.effects import Passage

DRAWN = "drawn"
PASSAGES = 320
"""Pictures that are drawn or taken where no number is given: narrow gaps are rare in a model that is sure."""
LONGEST = 64
"""Most tokens of an answer."""
BATCH = 16
"""Questions asked at once."""
QUESTIONS = (
    "Describe this picture.",
    "What is written in this picture?",
    "What is in the middle of this picture?",
    "How many things are in this picture, and which?",
)
"""What is asked about pictures that come without a question, in turn."""


def calibration_passages(
    vlm: VLM,
    source: str | Path,
    *,
    n: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Passage]:
    """Ask a model about n pictures, "drawn" or those of a folder, `PASSAGES` at most when None, and return
    prompts and answers as embeddings. `progress` is told how many have been answered, of how many.

    Raises SeekVLError for n below 2, and for a folder that holds fewer than two pictures or bad ones.
    """
    if n is not None and (not is_whole(n) or n < 2):
        raise SeekVLError(
            f"calibration by {n!r} pictures: take 2 or more, one to round by and one to measure"
        )
    asked = drawn(n or PASSAGES, seed=seed) if str(source) == DRAWN else of_folder(Path(source), n=n)
    passages: list[Passage] = []
    for start in range(0, len(asked), BATCH):
        some = asked[start : start + BATCH]
        answers = vlm.batch(some, max_new_tokens=LONGEST)
        passages += [_passage(vlm, *pair) for pair in zip(some, answers, strict=True)]
        if progress is not None:
            progress(len(passages), len(asked))
    return passages


def drawn(n: int, *, seed: int) -> list[Conversation]:
    """Draw n pictures from the side that models are trained on, with a question each."""
    conversations = []
    for index in range(n):
        kind = KINDS[index % len(KINDS)]
        conversation = sample(seed, index, kind=kind, held_out=False, questions=1).conversation
        conversations.append(Conversation(conversation.messages[:-1], conversation.system))
    return conversations


def of_folder(folder: Path, *, n: int | None) -> list[Conversation]:
    """Return a question about each of the first n pictures of a folder, `PASSAGES` at most when None."""
    if not folder.is_dir():
        raise SeekVLError(
            f"there is no folder {folder} to calibrate by; give a folder of pictures, or {DRAWN!r}"
        )
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[: n or PASSAGES]
    if len(paths) < 2:
        raise SeekVLError(
            f"{folder} holds {len(paths)} pictures ({', '.join(sorted(SUFFIXES))}): calibration needs 2"
        )
    return [Conversation((user_message(_question(path, index), path),)) for index, path in enumerate(paths)]


def _question(path: Path, index: int) -> str:
    """Return what is asked about a picture."""
    text = path.with_suffix(".txt")
    if not text.exists():
        return QUESTIONS[index % len(QUESTIONS)]
    question = text.read_text(encoding="utf-8").strip()
    if not question:
        raise SeekVLError(f"{text} is empty: write the question about {path.name} into it, or remove it")
    return question


@torch.no_grad()
def _passage(vlm: VLM, conversation: Conversation, answer: Answer) -> Passage:
    """Return a prompt and its answer as embeddings."""
    prompt = embed_prompt(vlm.model, vlm.processor.encode(conversation))[0]  # t d
    ended = answer.finish_reason == "stop"
    ids = torch.tensor(answer.token_ids if ended else answer.token_ids[:-1], dtype=torch.long)
    embeds = torch.cat((prompt, vlm.model.language.embed_tokens(ids)))
    return Passage(embeds=embeds, places=len(ids) + 1)
