"""Questions as datasets write them, options and all in one text, taken apart.

A benchmark's question goes into a row without its options, and its answer as a letter; prompts.py renders both again.
"""
import re
from string import ascii_uppercase

MARK = re.compile(  # a bracketed letter may follow a full stop directly
    r"(?:^|(?<=[\s,;])|(?<=[.:?!])(?=\())(?:(Option|Caption|Sentence|Choice) )?(?:\((\w)\)|([A-Z0-9])([.:)]))[ \t]*", re.M)
HEADING = re.compile(
    r"\s*(?:Select from the following choices\.?|(?:The )?(?:Options|choices)(?: are listed below)?:?)\s*\Z", re.I)
REQUEST = re.compile(r"\s*(?:please |answer |select |choose |respond |reply |the best answer is).*", re.I | re.S)


def split_options(text: str) -> tuple[str, list[str]]:
    """'Which?\\n(A) one\\n(B) two' -> ('Which?', ['one', 'two']), for the dresses in which datasets write options: (A),
    (a), A., A), A:, Caption A:, Option 1:, one a line or all in one. No options give (text, []).

    The last list counts. What follows it stays with the question, unless it only asks for a form of answer."""
    marks = [m for m in MARK.finditer(text) if m[1] or not (m[2] or m[3]).isdigit()]
    for start in reversed([n for n, m in enumerate(marks) if _index(m) == 0]):
        form = _form(marks[start])
        found = [marks[start]]
        found += [m for m in marks[start + 1 :] if _form(m) == form]
        found = [m for n, m in enumerate(found) if _index(m) == n]
        if len(found) < 2:
            continue
        end = text.find("\n", found[-1].end())
        end = len(text) if end < 0 else end
        ends = [m.start() for m in found[1:]] + [end]
        options = [text[m.end() : stop].strip().rstrip(",;").strip() for m, stop in zip(found, ends)]
        if all(options):
            question, rest = HEADING.sub("", text[: found[0].start()]).strip(), text[end:].strip()
            return (question if not rest or REQUEST.fullmatch(rest) else f"{question}\n{rest}"), options
    return text.strip(), []


def _index(mark: re.Match) -> int:
    symbol = (mark[2] or mark[3]).upper()
    return int(symbol) - 1 if symbol.isdigit() else ord(symbol) - 65


def _form(mark: re.Match) -> tuple:
    symbol = mark[2] or mark[3]
    return mark[1], mark[4], symbol.isdigit(), symbol.isupper()


def gold_letter(answer: str, options: list[str]) -> str | None:
    """'(B)', 'b', 'B. its text' or its text -> 'B'; None if it names no option."""
    bare, letters = answer.strip(" ().").upper(), ascii_uppercase[: len(options)]
    if len(bare) == 1 and bare in letters:
        return bare
    folded = [option.strip().lower() for option in options]
    for text in (answer, re.sub(r"^\(?(?:(?:Option|Caption|Sentence|Choice) )?\w[).:]\s*", "", answer)):
        if text.strip().lower() in folded:
            return letters[folded.index(text.strip().lower())]
    lead = re.match(r"\(?(?:(?:Option|Caption|Sentence|Choice) )?([A-Z])[).:]", answer)
    return lead[1] if lead and lead[1] in letters else None


def choice(text: str, options: list[str], answer) -> dict:
    """A choice; text may hold the options too. Raises ValueError if answer names none of them."""
    options, answer = [str(option).strip() for option in options], str(answer)
    gold, (question, listed) = gold_letter(answer, options), split_options(text)
    if gold is None:
        raise ValueError(f"answer {answer!r} is none of {options}: correct one of the two")
    question = question if len(listed) == len(options) else HEADING.sub("", text).strip()
    return {"question": question, "options": options, "gold": gold, "kind": "choice", "raw_gold": answer}


def asked(text: str, answer, *, number: str = "number") -> dict:
    """A question whose text may list options: a choice if it does and answer is one of them, else yes or no, a number
    (of kind `number`) or a text."""
    answer = str(answer).strip()
    question, options = split_options(text)
    if options and gold_letter(answer, options):
        return choice(text, options, answer)
    kind = "yes_no" if answer.lower().strip(" .") in ("yes", "no") else "text"
    kind = number if re.fullmatch(r"-?[0-9][0-9,]*(\.[0-9]+)?", answer) else kind
    return {"question": text.strip(), "options": [], "gold": answer, "kind": kind, "raw_gold": answer}


def unlettered(options) -> list[str]:
    """['A. left', 'B. right'] -> ['left', 'right']."""
    return [re.sub(r"^\(?[A-Z][).:]\s*", "", str(option)) for option in options]
