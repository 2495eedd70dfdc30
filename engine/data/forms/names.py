"""The names that columns have in the wild, and what they mean. Names are compared as `plain_name` writes them."""

from __future__ import annotations

import re


def plain_name(name: str) -> str:
    """ "Chosen Response", "chosenResponse" and "chosen-response" are "chosen_response"."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\W_]+", "_", snake.lower()).strip("_")


PROMPTS = (
    "prompt", "question", "query", "instruction", "request", "brief", "problem", "user_prompt", "user_query",
    "user_input", "user_message", "input", "inputs",
)  # fmt: skip
CONTEXTS = ("context", "context_messages", "prompt_messages")  # the prompt, if they hold turns
CONVERSATIONS = (
    "messages", "conversations", "conversation", "contents", "dialog", "dialogue", "chat", "transcript", "trajectory",
)  # fmt: skip
INPUTS = ("input", "instruction_input")  # below an instruction
CONTEXT = "context"  # a text below an instruction of that name
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
HISTORIES = ("history", "chat_history")
ANSWERS = (
    "completion", "response", "answer", "output", "reply", "generation", "model_output", "assistant", "target",
    "targets", "gpt", "bot", "tgt",
)  # fmt: skip
ASKED_BY = {  # names that are a prompt's beside an answer of this name alone
    "assistant": ("user", "human"), "gpt": ("user", "human"), "bot": ("user", "human"), "tgt": ("source", "src"),
    "target": ("source", "src"), "targets": ("source", "src"),
}  # fmt: skip
TOOLS = ("tools", "functions")
TEMPLATE_SETTINGS = ("chat_template_kwargs",)

# Two sides, the better one first: a word alone, or before or behind a noun ("chosen_response", "answer_rejected").
SIDE_WORDS = (
    ("chosen", "rejected"), ("preferred", "non_preferred"), ("preferred", "dispreferred"), ("preferred", "rejected"),
    ("preferred", "other"), ("accepted", "rejected"), ("winner", "loser"), ("winning", "losing"), ("win", "lose"),
    ("good", "bad"), ("better", "worse"), ("best", "worst"), ("positive", "negative"), ("pos", "neg"), ("w", "l"),
)  # fmt: skip
NOUNS = (
    "response", "answer", "output", "completion", "message", "messages", "text", "conversation", "conversations",
    "reply", "generation", "summary", "y",
)  # fmt: skip
# Two answers, nobody knows which is better: the suffixes of their names.
SUFFIXES = (("0", "1"), ("1", "2"), ("a", "b"), ("j", "k"), ("left", "right"), ("first", "second"))
STEMS = (*NOUNS, "candidate", "response_text", "option", "model_response", "human_ref", "assistant", "chat", "model")

VERDICTS = (
    "label", "winner", "preference", "preferred", "choice", "chosen", "better", "better_response_id", "better_response",
    "better_answer", "verdict", "vote", "human_preference", "overall_preference", "preferred_response", "judgment",
    "safer_response_id", "selected", "preference_strength",
)  # fmt: skip
VOTES = ("votes", "preferences", "labels", "annotations")  # verdicts of several annotators
LABELS = (
    "label", "kto_tag", "labels", "thumb", "thumbs", "feedback", "is_good", "good", "liked", "is_positive", "desirable",
    "is_desirable", "accepted", "is_correct", "correct", "vote", "reaction", "upvoted",
)  # fmt: skip
# Flags of true and false alone: the same words may name scores.
FLAGS = (
    "acceptable", "is_acceptable", "approved", "is_approved", "is_safe", "safe", "helpful", "is_helpful", "thumbs_up",
    "thumb_up", "upvote", "is_liked", "is_preferred", "is_chosen", "is_good_answer", "is_valid", "valid", "passed",
    "success", "is_success", "successful", "is_successful", "resolved", "is_resolved", "solved", "is_solved",
    "positive",
)  # fmt: skip
BAD_FLAGS = (  # true is bad
    "rejected", "toxic", "is_toxic", "toxicity", "bad", "is_bad", "harmful", "is_harmful", "unsafe", "is_unsafe",
    "flagged", "discarded", "spam", "is_spam", "hallucinated", "incorrect", "is_incorrect", "wrong", "disliked",
    "thumbs_down", "thumb_down", "downvote", "deleted", "is_rejected", "is_flagged", "is_deleted", "negative",
    "is_negative", "failed", "is_failed",
)  # fmt: skip
COUNTED = {"thumbs_up", "thumb_up", "upvote", "thumbs_down", "thumb_down", "downvote"}  # flags, or how many there are
BROKEN_OFF = {"has_error", "is_error", "truncated", "is_truncated", "timed_out"}  # flags of an answer: it is not whole
REVIEWS = {  # flags of a row, whatever it holds
    "approved", "is_approved", "is_valid", "valid", "keep", "is_kept", "include", "included", "use", "usable",
    "is_usable",
}  # fmt: skip
BAD_REVIEWS = {
    "flagged", "is_flagged", "discarded", "deleted", "is_deleted", "spam", "is_spam", "rejected", "is_rejected",
    "exclude", "excluded", "skip", "skipped", "ignore", "ignored", "drop", "dropped", "duplicate", "is_duplicate",
}  # fmt: skip
STATUSES = (  # what became of a row: in words
    "status", "state", "review", "review_result", "moderation", "moderation_result", "decision", "approval", "outcome",
    "disposition", "quality", "validity", "result", "evaluation", "review_status", "moderation_status",
    "annotation_status", "approval_status", "label_status", "qa_status",
)  # fmt: skip
SCORES = ("score", "rating", "overall_score", "overall_rating", "stars", "reward", "quality", "helpfulness", "rank")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # the first counts
ANSWER_LISTS = (
    "completions", "responses", "answers", "candidates", "outputs", "generations", "choices", "replies",
    "all_responses", "summaries",
)  # fmt: skip
SCORE_LISTS = (
    "scores", "rewards", "ratings", "rankings", "ranks", "rank", "ranking", "score", "reward", "rating", "correct",
    "is_correct", "accepted", "passed",
)  # fmt: skip
BEST_INDEX = (
    "chosen_index", "best_index", "chosen_idx", "best_idx", "best", "preferred_index", "selected_index", "selected_idx",
    "selected", "winner_index", "label", "choice",
)  # fmt: skip
BEST_NAMES = (  # the name of the best answer, or its text
    "winner", "best", "best_model", "winner_model", "preferred", "preferred_model", "chosen", "chosen_model", "choice",
    "selected", "best_response", "best_answer", "best_completion", "verdict", "label", "preference",
)  # fmt: skip
ORDERS = (  # names of answers in order
    "ranking", "rankings", "order", "preference_order", "ranked", "human_ranking", "ranks", "rank", "preference",
    "preferences", "verdict", "label",
)  # fmt: skip
NAME_LISTS = ("models", "model_names", "generators")
TURN_MASKS = ("loss_mask", "loss_masks", "loss_weights", "weights", "turn_weights", "train_mask", "train_on_turns")
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "pixel_values")

# Columns that say something about a row and are no part of it. Whole names, then the ends of names.
METADATA = {
    "annotations", "annotator", "annotators", "author", "category", "categories", "comment", "comments", "created",
    "correct_answers", "critique", "data_source", "dataset", "date", "difficulty", "domain", "file", "files", "hash",
    "hash_id", "id", "idx", "incorrect_answers", "index", "info", "judge", "judgement", "justification", "lang",
    "language", "license", "link", "meta", "metadata", "model", "models", "name_of_source", "note", "notes", "origin",
    "path", "principle", "rater", "sha", "source", "sources", "split", "state", "status", "subject", "subset",
    "subtopic", "tag", "tags", "task", "task_type", "time", "timestamp", "topic", "topics", "turn", "turns", "type",
    "url", "urls", "user", "uuid", "version", "title", "key", "instruction_source", "good_natured", "generator",
    "generators", "datasplit", "batch", "worker", "policy", "subreddit", "preference_statement", "model_names",
    "subcategory", "country", "hashed_ip", "language_code",
    "preference_elaboration",
}  # fmt: skip
METADATA_ENDS = (
    "_id", "_ids", "_uuid", "_hash", "_model", "_models", "_model_name", "_source", "_lang", "_language", "_date",
    "_time", "_timestamp", "_at", "_type", "_category", "_url", "_name", "_version", "_idx", "_index", "_score",
    "_scores", "_rating", "_ratings", "_tags", "_meta", "_metadata", "_annotator", "_path", "_status",
)  # fmt: skip
METADATA_STARTS = ("generator_", "model_", "score_", "rating_", "meta_", "metadata_", "source_", "annotator_")
# Of those, what may be a text of any length: words about the row.
REMARKS = {
    "comment", "comments", "critique", "justification", "judgement", "note", "notes", "preference_statement",
    "preference_elaboration", "principle",
    # as `prefuse label` and `prefuse revise` write them
    "annotator_name", "annotator_key", "annotator_principle", "meta_answers_by", "meta_first_answer",
}  # fmt: skip
SWAPPED = ("swapped", "is_swapped", "flipped", "is_flipped", "reversed", "is_reversed")


def judges(column: str, of_pairs: bool) -> bool:
    """Whether a column of this name says how good a row is (of pairs: whether it counts, and which way round)."""
    name = plain_name(column)
    names = {*SWAPPED, *VERDICTS} if of_pairs else {*LABELS, *FLAGS, *BAD_FLAGS, *SCORES, *BROKEN_OFF}
    return name in names | REVIEWS | BAD_REVIEWS or is_status(column)


def is_status(column: str) -> bool:
    """Whether a column of this name says, in words, what became of a row."""
    name = plain_name(column)
    return name in STATUSES or name.endswith("_status")


def is_metadata(column: str) -> bool:
    name = plain_name(column.rpartition(".")[2])  # of a value inside an object, its own key
    return name in METADATA or name.endswith(METADATA_ENDS) or name.startswith(METADATA_STARTS)


def side_names() -> list[tuple[str, str]]:
    """All the names that the two sides of a pair can have, the better one first."""
    names = [("chosen", "rejected")]
    for good, bad in SIDE_WORDS:
        if good != "w":
            names.append((good, bad))
        for noun in NOUNS:
            names += [(f"{good}_{noun}", f"{bad}_{noun}"), (f"{noun}_{good}", f"{noun}_{bad}")]
    return names


def answer_names() -> list[tuple[str, str, str, str]]:
    """(first name, second name, first suffix, second suffix) of two answers beside each other."""
    names = []
    for stem in STEMS:
        for first, second in SUFFIXES:
            names.append((f"{stem}_{first}", f"{stem}_{second}", first, second))
            names.append((f"{stem}{first}", f"{stem}{second}", first, second))
            if not first.isdigit():
                names.append((f"{first}_{stem}", f"{second}_{stem}", first, second))
    return names
