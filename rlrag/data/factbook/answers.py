"""Extracts short answers from the text of a Factbook field.

Each function returns the accepted answers, the fullest first, or nothing where the text gives no
single short answer: several values, a tie, a placeholder such as "none" or "NA".
"""

from __future__ import annotations

import re

Answers = tuple[str, ...]

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_DATE = re.compile(r"(\d{1,2} [A-Z][a-z]+ (\d{4}))")
_DAY = re.compile(r"\d{1,2} [A-Z][a-z]+(?= \()")
_SHARE = re.compile(rf"(?P<name>[^,;()%]*?)\s(?P<share>{_NUMBER})%")
_BORDER = re.compile(rf"(?P<name>[^;:]+?) (?P<length>{_NUMBER}) km")
_PARENTHESES = re.compile(r"\([^()]*\)")
_PLACEHOLDER = re.compile(r"(none|na|n/a|not available|unnamed .*|.*\bNA\b.*|)$")


def quantity(text: str, unit: str = "") -> Answers:
    """The number at the start, with and without its unit.

    Example:
        >>> quantity("923,768 sq km", "sq km")
        ('923,768 sq km', '923,768')
        >>> quantity("244,344,065 (2025 est.)")
        ('244,344,065',)
    """
    joint = "" if unit == "%" else " "
    match = re.match(rf"({_NUMBER}){joint + re.escape(unit) if unit else ''}(?=$|[\s;,(])", text)
    if not match or not match.group(1).strip("0.,-"):
        return ()
    return tuple(dict.fromkeys((match.group(0), match.group(1))))


def share(text: str) -> Answers:
    """The percentage at the start; nothing for 0 % and 100 %, which many countries have.

    Example:
        >>> share("55.4% (2022 est.)")
        ('55.4%', '55.4')
    """
    answers = quantity(text, "%")
    return () if answers and answers[-1] in ("100", "100.0") else answers


def single_name(text: str) -> Answers:
    """A name that stands alone, without what parentheses add to it.

    Example:
        >>> single_name("National Assembly (Natsionalnoye Sobranie)")
        ('National Assembly', 'Natsionalnoye Sobranie')
        >>> single_name("Porto-Novo (constitutional capital); Cotonou (seat of government)")
        ()
    """
    alone = text.partition("; note")[0]
    name, bracket, rest = alone.partition(" (")
    inner = rest.removesuffix(")") if bracket else ""
    several = any(mark in name for mark in ";,") or any(mark in inner for mark in ";()")
    if several or _PLACEHOLDER.match(name):
        return ()
    # A capital letter marks another name; a small one, a remark.
    is_name = inner[:1].isupper() and "," not in inner and " or " not in inner
    return (name, inner) if is_name else (name,)


def plain_name(text: str) -> Answers:
    """A name that stands alone and needs no parentheses.

    Example:
        >>> plain_name("double-headed eagle"), plain_name("lion (Britain)")
        (('double-headed eagle',), ())
    """
    return () if "(" in text else single_name(text)


def first_item(text: str) -> Answers:
    """The first entry of a list ordered by size.

    Example:
        >>> first_item("crude petroleum, natural gas, gold (2023)")
        ('crude petroleum',)
    """
    item = _PARENTHESES.sub("", text).partition(",")[0].partition(";")[0].strip()
    return () if _PLACEHOLDER.match(item) or ":" in item or not item else (item,)


def largest_share(text: str) -> Answers:
    """The name with the largest percentage of a list, unless another ties with it.

    Example:
        >>> largest_share("Hausa 30%, Yoruba 15.5%, other 24.9% (2018 est.)")
        ('Hausa',)
        >>> largest_share("Germany 9%, USA 9%")
        ()
    """
    listed = _PARENTHESES.sub("", text).partition(";")[0]
    found = [
        (float(m["share"].replace(",", "")), m["name"].strip()) for m in _SHARE.finditer(listed)
    ]
    found.sort(reverse=True)
    if not found or (len(found) > 1 and found[0][0] == found[1][0]):
        return ()
    name = found[0][1]
    vague = name.lower().startswith(
        ("other", "none", "unspecified", "mixed", "no ", "non", "unaff")
    )
    return () if vague or not name or ":" in name or "<" in name else (name,)


def highest_point(text: str) -> Answers:
    """The name before a height in metres.

    Example:
        >>> highest_point("Chappal Waddi 2,419 m"), highest_point("unnamed location 9 m")
        (('Chappal Waddi',), ())
    """
    match = re.match(rf"([A-Z][^;,:()\d]*?)(?: \([^()]*\))? {_NUMBER} m(?=$|[\s;(])", text)
    return (match.group(1),) if match else ()


def longest_border(text: str) -> Answers:
    """The neighbour with the longest border, of at least two.

    Example:
        >>> longest_border("Benin 809 km; Cameroon 1,975 km; Niger 1,608 km")
        ('Cameroon',)
    """
    lengths = [
        (float(match["length"].replace(",", "")), match["name"].strip())
        for match in map(_BORDER.match, text.split(";"))
        if match
    ]
    lengths.sort(reverse=True)
    return (lengths[0][1],) if len(lengths) > 1 and lengths[0][0] > lengths[1][0] else ()


def independence_date(text: str) -> Answers:
    """The one date of independence, and its year.

    Example:
        >>> independence_date("1 October 1960 (from the UK)")
        ('1 October 1960', '1960')
    """
    match = _DATE.match(text)
    return match.groups() if match and len(re.findall(r"\d{4}", text)) == 1 else ()


def former_ruler(text: str) -> Answers:
    """The one power that a country became independent from.

    Example:
        >>> former_ruler("1 October 1960 (from the UK)")
        ('the UK', 'UK')
    """
    match = re.search(r"\(from ([^(),;]+)\)", text)
    if not match or text.count("(from") != 1 or " and " in match.group(1):
        return ()
    ruler = match.group(1)
    return (ruler, ruler.removeprefix("the ")) if ruler.startswith("the ") else (ruler,)


def holiday_date(text: str) -> Answers:
    """The day and month of the one national holiday.

    Example:
        >>> holiday_date("Independence Day (National Day), 1 October (1960)")
        ('1 October',)
    """
    found = _DAY.findall(text)
    return (found[0],) if len(found) == 1 and ";" not in text else ()


def currency(text: str) -> Answers:
    """The money's name and its code.

    Example:
        >>> currency("Moldovan lei (MDL) per US dollar -")
        ('Moldovan lei', 'MDL')
    """
    match = re.match(r"([^(),;]+?) \(([A-Z]{3})\) per US dollar", text)
    return match.groups() if match else ()


def head_of_state(text: str) -> Answers:
    """The one person at the head of a state: with title, and the name in capitals alone.

    Example:
        >>> head_of_state("President Bola Ahmed Adekunle TINUBU (since 29 May 2023)")
        ('Bola Ahmed Adekunle TINUBU', 'President Bola Ahmed Adekunle TINUBU', 'TINUBU')
    """
    match = re.fullmatch(
        r"((President|King|Queen|Emir|Sultan) ([^(),;:]+?)) \(since [^()]+\)", text
    )
    if not match or match.group(3).startswith("of "):
        return ()
    with_title, _, name = match.groups()
    # The Factbook writes the family name in capitals.
    family_name = " ".join(word for word in name.split() if len(word) > 2 and word.isupper())
    return tuple(dict.fromkeys(part for part in (name, with_title, family_name) if part))


def official_language(text: str) -> Answers:
    """The one language marked as official.

    Example:
        >>> official_language("Hausa, Zarma, French (official), Fufulde")
        ('French',)
    """
    found = re.findall(rf"(?:^|[,;] )([A-Z][\w' -]*?)(?: {_NUMBER}%)? \(official\)", text)
    return (found[0],) if len(found) == 1 and text.count("official") == 1 else ()


def largest_city(text: str) -> Answers:
    """The city with the most people, of at least two; a capital may stand before larger ones.

    Example:
        >>> largest_city("231,000 YAMOUSSOUKRO (capital) (2018), 5.686 million ABIDJAN (2023)")
        ('ABIDJAN',)
    """
    sizes = {}
    for number, unit, city in re.findall(rf"(?:^|[,;] )({_NUMBER}) (million )?([^\d,;()]+)", text):
        size = float(number.replace(",", ""))
        # "872,000 million" is a slip for 872,000.
        sizes[city.strip()] = size * 1e6 if unit and size < 1000 else size
    return (max(sizes, key=sizes.__getitem__),) if len(sizes) > 1 else ()


def demonym(text: str) -> Answers:
    """What one person of a country is called.

    Example:
        >>> demonym("Nigerian(s)")
        ('Nigerian',)
    """
    match = re.match(r"([A-Z][\w' -]+)(\(s\))?$", text)
    return (match.group(1).strip(),) if match else ()


def anthem_title(text: str) -> Answers:
    """The title in quotation marks, and its translation in parentheses.

    Example:
        >>> anthem_title('"Angola Avante" (Forward Angola)')
        ('Angola Avante', 'Forward Angola')
    """
    match = re.fullmatch(r"[\"“]([^\"“”();]+)[\"”](?: \(([^();\"“”]+)\))?", text)
    return tuple(part.strip() for part in match.groups() if part) if match else ()


def code(text: str) -> Answers:
    """An internet country code or an aircraft prefix that stands alone.

    Example:
        >>> code(".ng"), code("HJ, HK")
        (('.ng',), ())
    """
    return (text,) if re.fullmatch(r"\.?[A-Za-z0-9-]{1,5}", text) else ()
