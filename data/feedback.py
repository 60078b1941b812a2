"""What people wrote and ranked, in the formats it comes in: one reader a format.

A reader takes one object of a file and gives {"sft": rows, "comparisons": rows, "prompts": rows,
"pretrain": texts}, or some of them. What is wrong with it is a ValueError that names the field;
what is right and still left out is counted in `notes`. White space around a message is dropped.
"""

import os
from collections import Counter

from data.formats import EOT
from data.rows import brief, canonical, check, checked_messages, is_text

ASSISTANT = "\n\nAssistant:"
HUB = "https://huggingface.co/datasets/"
OASST = (HUB + "OpenAssistant/oasst1/resolve/main/2023-04-12_oasst_ready.trees.jsonl.gz",
         "2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7")
HH = HUB + "Anthropic/hh-rlhf/resolve/main/{}/{}.jsonl.gz"
HH_SHA256 = {  # train, test
    "helpful-base": ("518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
                     "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b"),
    "helpful-online": ("0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a",
                       "39a475cc7e0df972902f8e3a0972726fce826ac65369bda8c671de4330c60a10"),
    "helpful-rejection-sampled": (
        "0cea2d2ab2187624ec1314e8cc6fb579f0fa987b3a33e8102b7556ed4d255f64",
        "abc35dbc56015db1dae0faa484514ccbc3eee0133bfcd557fc69250619b028bb"),
    "harmless-base": ("bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
                      "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"),
}
WEBTEXT = "https://openaipublic.blob.core.windows.net/gpt-2/output-dataset/v1/webtext.{}.jsonl"

ALIASES = {"prompt": ("prompt", "instruction", "question", "query"),
           "completion": ("completion", "output", "response", "answer")}
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # ShareGPT's
KEPT = ("labeler", "task", "source")  # fields that only sort the results


def text_of(row: dict, field: str, where: str = "") -> str:
    if not is_text(row.get(field)):
        should = "a string of valid Unicode"
        raise ValueError(f"{where}{field} should be {should}, not {brief(row.get(field))}")
    return row[field]


def reply(text: str) -> str:
    """As every completion here: a space first, nothing at all if it is empty."""
    return " " + text.strip() if text.strip() else ""


def document(text: str, notes: Counter) -> str:
    """Text of one document: only the file itself may part documents."""
    notes[f"{EOT} inside a document, broken by a space"] += text.count(EOT)
    return text.replace(EOT, "<| endoftext|>")


# ---- OpenAssistant ----------------------------------------------------------------------------

def oasst(tree: dict, notes: Counter, lang: str = "en") -> dict[str, list]:
    """A message tree, in which the replies to a message have ranks, 0 the best.

    Every message of a person is the end of a prompt. Its replies are a ranking if there are two
    or more and all have ranks; the best of them, or the only one, is a demonstration.
    """
    found = {"sft": [], "comparisons": [], "prompts": []}
    if tree.get("tree_state", "ready_for_export") != "ready_for_export":
        notes["trees that are not ready for export"] += 1
        return found
    queue = [(node, "") for node in kept([tree.get("prompt")], "prompt", "prompter", lang, notes)]
    for node, before in queue:
        human = node["role"] == "prompter"
        dialogue = f"{before}\n\n{'Human' if human else 'Assistant'}: {node['text'].strip()}"
        other = "assistant" if human else "prompter"
        replies = kept(node.get("replies") or [], "replies", other, lang, notes)
        queue += [(node, dialogue) for node in replies]
        if human:
            add_replies(found, dialogue + ASSISTANT, replies, notes)
    return found


def add_replies(found: dict, prompt: str, replies: list[dict], notes: Counter) -> None:
    texts, ranks = [reply(node["text"]) for node in replies], [node.get("rank") for node in replies]
    found["prompts"].append({"prompt": prompt})
    if len(replies) == 1:
        found["sft"].append({"prompt": prompt, "completion": texts[0]})
    elif None in ranks:
        notes["groups of replies that are not fully ranked"] += 1
    elif replies:
        row = {"prompt": prompt, "completions": texts, "ranks": ranks}
        check(row, "ranks")
        found["comparisons"].append(row)
        found["sft"] += best(row)


def kept(nodes, field: str, role: str, lang: str, notes: Counter) -> list[dict]:
    """The messages to be used. One that is left out takes those below it along."""
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise ValueError(f"{field} should be of messages, objects with text, not {brief(nodes)}")
    good = []
    for node in nodes:
        text = text_of(node, "text", f"{field}: ")
        if node.get("role") != role:
            raise ValueError(f"{field}: role should be {role}, not {brief(node.get('role'))}")
        reason = ("deleted" if node.get("deleted")
                  else "that failed their review" if node.get("review_result") is False
                  else f"not in {lang}" if lang not in ("all", node.get("lang"))
                  else "without text" if not text.strip() else "")
        if reason:
            notes[f"messages {reason}"] += 1
            notes["messages below one left out"] += below(node)
        else:
            good.append(node)
    return good


def below(node: dict) -> int:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(node, dict) for node in replies):
        raise ValueError(f"replies should hold messages, not {brief(replies)}")
    return sum(1 + below(node) for node in replies)


# ---- Anthropic, OpenAI ------------------------------------------------------------------------

def hh(row: dict, notes: Counter) -> dict[str, list]:
    """Two dialogues, alike up to the reply that people chose or rejected."""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    cut = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT) + len(ASSISTANT)
    if cut < len(ASSISTANT):
        turn = brief(ASSISTANT)
        raise ValueError(f"rejected should share a turn {turn} with chosen, not {brief(rejected)}")
    completions = [reply(chosen[cut:]), reply(rejected[cut:])]
    if completions[0] == completions[1]:
        notes["pairs with chosen equal to rejected"] += 1
        return {}
    notes["replies that hold a further turn"] += sum(ASSISTANT in text for text in completions)
    return {"comparisons": [{"prompt": chosen[:cut], "completions": completions, "ranks": [0, 1]}]}


def webtext(row: dict, notes: Counter) -> dict[str, list]:
    """A document of the gpt-2-output-dataset."""
    text = document(text_of(row, "text"), notes)
    notes["documents without text"] += not text.strip()
    return {"pretrain": [text]} if text.strip() else {}


# ---- a person's own files ---------------------------------------------------------------------

def own(row: dict, notes: Counter) -> dict[str, list]:
    """A row with any of the fields that README.md beside this file lists."""
    row, found = renamed(row), {}
    if is_text(row.get("chosen")) and "prompt" not in row and "messages" not in row:
        return hh(row, notes)
    row = canonical(row)
    if "prompt" in row:
        check(row)
        more = {field: text_of(row, field) for field in KEPT if row.get(field) is not None}
        prompt = {"prompt": turn(row["prompt"]), **more}
        if "completions" in row:
            texts = [reply(text) for text in row["completions"]]
            found["comparisons"] = [{**prompt, "completions": texts, "ranks": row["ranks"]}]
        if "completion" in row and row.get("label") is not False:
            found["sft"] = [{**prompt, "completion": reply(row["completion"])}]
        if not row.keys() & {"completion", "completions"}:
            found["prompts"] = [prompt]
        notes["answers with the label false, no use here"] += not found
    elif "text" in row:
        return webtext(row, notes)
    else:
        names = brief(sorted(row))
        raise ValueError(f"should have prompt, messages, chosen and rejected or text, not {names}")
    return found


def turn(prompt: str) -> str:
    """A question becomes the human's turn; a dialogue stays as it is."""
    return prompt if prompt.endswith(ASSISTANT) else f"\n\nHuman: {prompt.strip()}{ASSISTANT}"


def renamed(row: dict) -> dict:
    """Other people's names for our fields: Alpaca's, ShareGPT's, TRL's lists of messages ..."""
    row = dict(row)
    for name, others in ALIASES.items():
        if aliases := [alias for alias in others if alias in row]:
            row[name] = row.pop(aliases[0])
            if aliases[0] != name:
                text_of({aliases[0]: row[name]}, aliases[0])
            if aliases[0] == "instruction" and row.get("input"):
                row[name] += "\n" + text_of(row, "input")
    if "conversations" in row:
        row["messages"] = spoken(row.pop("conversations"))
    if isinstance(row.get("prompt"), list):
        row["messages"] = row.pop("prompt")
    for name in ("completion", "chosen", "rejected"):
        if isinstance(row.get(name), list):
            row = last_word(row, name)
    return ranked(row)


def spoken(turns) -> list[dict]:
    """ShareGPT's {"from", "value"} as {"role", "content"}."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"conversations should be a list of turns, not {brief(turns)}")
    roles = [SPEAKERS.get(str(turn.get("from")), turn.get("from")) for turn in turns]
    return [{"role": role, "content": turn.get("value")} for role, turn in zip(roles, turns)]


def last_word(row: dict, name: str) -> dict:
    """A completion as messages: the last of them; those before it are the prompt, if it has none
    and all that are given this way agree on it."""
    try:
        *before, last = checked_messages(row[name])
    except ValueError as error:
        raise ValueError(str(error).replace("messages", name, 1)) from None
    if before and "prompt" not in row and row.setdefault("messages", before) != before:
        raise ValueError(f"{name} should begin with the prompt's messages, not {brief(before)}")
    return {**row, name: last["content"]}


def ranked(row: dict) -> dict:
    """Completions with their ranks beside their text, or with scores: the highest is best."""
    completions, scores = row.get("completions"), row.get("scores")
    if isinstance(completions, list) and any(isinstance(each, dict) for each in completions):
        both = [each if isinstance(each, dict) else {} for each in completions]
        row["completions"] = [each.get("completion") for each in both]
        row.setdefault("ranks", [each.get("rank") for each in both])
    if scores is not None and "ranks" not in row:
        if not isinstance(scores, list) or not all(type(x) in (int, float) for x in scores):
            raise ValueError(f"scores should be a list of numbers, not {brief(scores)}")
        row["ranks"] = [sum(other > score for other in scores) for score in scores]
    return row


# ---- from what was found to what the stages need ----------------------------------------------

def best(ranking: dict) -> list[dict]:
    """Of a ranking, the completions that nothing is better than, as demonstrations."""
    row = {key: value for key, value in ranking.items() if key not in ("completions", "ranks")}
    first, answers = min(ranking["ranks"]), zip(ranking["completions"], ranking["ranks"])
    if len(set(ranking["ranks"])) == 1:
        return []
    return [{**row, "completion": text} for text, rank in answers if rank == first and text]
