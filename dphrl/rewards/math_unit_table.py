r"""The units of measurement that answers have, by symbol and by name; each stands for one full name.

A name with "_" is a kind of what follows it: a fluid_ounce is an ounce, and a celsius_degree is a degree. So "5 ounces"
may mean "5 fluid ounces", and "5 °C" differs from "5 °F".
"""

from __future__ import annotations

# Full name: other words for it. Plurals in -s are understood, and names are read in any case.
_NAMES = """
meter: metre | inch: inche inches | foot: feet | yard | mile | nautical_mile: knot-mile | furlong | fathom | angstrom
lightyear: light-year | parsec | league
gram: gramme gm gms | kilogram: kilos | pound: lbs | ounce | ton: tonne | stone | carat | grain
liter: litre | gallon: gal gals | quart: qt qts | pint: pt pts | cup | tablespoon: tbsp tbsps tbs | teaspoon: tsp tsps
bushel | barrel: bbl | fluid_ounce: floz
second: sec secs | minute: min mins | hour: hr hrs | day | week: wk wks | month: mos | year: yr yrs
decade | century: centuries | millennium: millennia | fortnight
acre | hectare
degree: deg degs | celsius_degree: celsius | fahrenheit_degree: fahrenheit | kelvin | radian: rad rads | steradian
arcminute | arcsecond | revolution: rev revs
watt | joule | newton | volt | ampere: amp amps | hertz | pascal | ohm | coulomb | farad | tesla | weber | henry | mole
electronvolt: electron-volt | calorie: cal cals | btu | horsepower: hp | atmosphere: atm | torr
kiloohm: kilohm | megaohm: megohm | candela | lumen | lux | decibel | becquerel | siemens: mho | molar
dalton: amu | gauss
bit | byte | pixel: px | baud
rpm | bpm | mph | kph: kmh kmph | mpg | fps | knot | mbps | kbps | gbps
dollar: usd buck | cent: cents ¢ c¢ | euro: eur | sterling_pound: gbp | penny: pence | yen: jpy | yuan: cny rmb
rupee: inr rs | franc: chf | peso: mxn | ruble: rouble rub | krona: kronor sek | krone: kroner | krw | dinar
dirham: aed | riyal | ringgit: myr | baht: thb | shekel: ils | zloty: pln | forint: huf | shilling | peseta
mark | crown | canadian_dollar: cad | australian_dollar: aud | singapore_dollar: sgd | hongkong_dollar: hkd
newzealand_dollar: nzd | taiwan_dollar: twd | norwegian_krone: nok | danish_krone: dkk | lira | koruna: czk
naira: ngn | taka: bdt | dong: vnd | rupiah: idr rp | hryvnia: uah | guinea
pakistani_rupee: pkr | egyptian_pound: egp
money | philippine_peso: php | kenyan_shilling: kes
unit: units | percentage_point
am | pm | oclock
"""
# Several words, or words joined by hyphens, that name one unit.
PHRASES = {
    "fluid ounce": "fluid_ounce", "fl oz": "fluid_ounce", "fl ounce": "fluid_ounce", "nautical mile": "nautical_mile",
    "light year": "lightyear", "metric ton": "metric_ton", "short ton": "short_ton", "long ton": "long_ton",
    "degree celsius": "celsius_degree", "degree c": "celsius_degree", "degree fahrenheit": "fahrenheit_degree",
    "degree f": "fahrenheit_degree",
    "deg c": "celsius_degree", "deg f": "fahrenheit_degree", "degree centigrade": "celsius_degree",
    "degree kelvin": "kelvin",
    "percentage point": "percentage_point", "us dollar": "dollar", "american dollar": "dollar",
    "canadian dollar": "canadian_dollar", "australian dollar": "australian_dollar", "british pound": "sterling_pound",
    "pound sterling": "sterling_pound", "indian rupee": "rupee", "japanese yen": "yen", "chinese yuan": "yuan",
    "swiss franc": "franc", "electron volt": "electronvolt", "horse power": "horsepower", "per cent": "percent",
    "solar mass": "solar_mass", "astronomical unit": "astronomical_unit",
    "revolution per minute": "rpm", "beat per minute": "bpm", "frame per second": "fps", "miles per gallon": "mpg",
}  # fmt: skip
# Units that are made of others.
_COMPOUND = {
    "mph": {"mile": 1, "hour": -1}, "kph": {"kilometer": 1, "hour": -1}, "mpg": {"mile": 1, "gallon": -1},
    "psi": {"pound": 1, "inch": -2}, "sqft": {"foot": 2}, "sqm": {"meter": 2},
    "cc": {"centimeter": 3}, "rpm": {"revolution": 1, "minute": -1},
    "kwh": {"kilowatt": 1, "hour": 1}, "kWh": {"kilowatt": 1, "hour": 1}, "Wh": {"watt": 1, "hour": 1},
    "MWh": {"megawatt": 1, "hour": 1}, "mAh": {"milliampere": 1, "hour": 1},
    "mbps": {"megabit": 1, "second": -1}, "kbps": {"kilobit": 1, "second": -1}, "gbps": {"gigabit": 1, "second": -1},
}  # fmt: skip
# Symbol: full name and the prefixes it takes. Symbols are read in this case only: 5 mm are no 5 MM, five million.
_SYMBOLS = {
    "m": ("meter", "pnµumcdkM"), "g": ("gram", "nµumk"), "s": ("second", "pnµum"), "L": ("liter", "µumcdkh"),
    "l": ("liter", "µumcd"), "N": ("newton", "mkM"), "J": ("joule", "mkMG"), "W": ("watt", "µmkMGT"),
    "V": ("volt", "µmkM"), "A": ("ampere", "nµm"), "Hz": ("hertz", "kMGT"), "Pa": ("pascal", "hkMG"),
    "Ω": ("ohm", "mkMG"), "eV": ("electronvolt", "mkMGT"), "mol": ("mole", "nµmk"), "cal": ("calorie", "k"),
    "F": ("farad", "pnµ"), "C": ("coulomb", "nµ"), "bar": ("bar", "mk"), "B": ("byte", "kKMGT"), "H": ("henry", "µ"),
    "Wb": ("weber", "m"), "Sv": ("sievert", "mµ"), "Gy": ("gray", "m"), "Bq": ("becquerel", "kM"),
    "in": ("inch", ""), "ft": ("foot", ""), "yd": ("yard", ""), "mi": ("mile", ""), "lb": ("pound", ""),
    "oz": ("ounce", ""), "h": ("hour", ""), "d": ("day", ""), "ha": ("hectare", ""), "Å": ("angstrom", ""),
    "ly": ("lightyear", ""), "AU": ("astronomical_unit", ""), "pc": ("parsec", "kM"), "dB": ("decibel", ""),
    "t": ("tonne", "k"), "K": ("kelvin", "m"), "T": ("tesla", "mµ"),
    "M": ("molar", "mµ"), "u": ("dalton", ""), "°C": ("celsius_degree", ""), "°F": ("fahrenheit_degree", ""),
    "°": ("degree", ""), "kg": ("kilogram", ""), "hz": ("hertz", ""), "€": ("euro", ""), "£": ("sterling_pound", ""),
    "¥": ("yen", ""), "₹": ("rupee", ""), "¢": ("cent", ""), "₩": ("krw", ""), "₽": ("ruble", ""), "元": ("yuan", ""),
}  # fmt: skip
_PREFIXES = {
    "p": "pico", "n": "nano", "µ": "micro", "u": "micro", "m": "milli", "c": "centi", "d": "deci", "h": "hecto",
    "k": "kilo", "K": "kilo", "M": "mega", "G": "giga", "T": "tera",
}  # fmt: skip
_PREFIXED_NAMES = (
    "meter metre gram gramme liter litre second watt joule newton volt ampere amp hertz pascal byte bit calorie ohm "
    "farad pixel mole electronvolt ton tonne henry coulomb bar parsec tesla molar"
)
# Symbols that are also read in capitals or with a capital letter: 5 KG, 5 Lbs.
_ANY_CASE = frozenset(["km", "cm", "kg", "ml", "ft", "in", "mi", "lb", "oz", "yd", "kb", "gb", "mb", "cc", "sqft"])


def _symbols() -> dict[str, str]:
    named = {symbol: name for symbol, (name, _) in _SYMBOLS.items()}
    for symbol, (name, prefixes) in _SYMBOLS.items():
        named.update({prefix + symbol: _PREFIXES[prefix] + name for prefix in prefixes})
    # 5 pm is a time, and "mad" or "mM" would only be words.
    del named["pm"]
    return named


def _names() -> dict[str, str]:
    named = {}
    for line in _NAMES.strip().splitlines():
        for entry in line.split("|"):
            name, _, others = entry.strip().partition(":")
            named.update(dict.fromkeys((name, *others.split()), name))
    for name in _PREFIXED_NAMES.split():
        full = named.get(name, name)
        named.update({prefix + name: prefix + full for prefix in set(_PREFIXES.values())})
    return named


SYMBOLS = _symbols()
NAMES = _names()


def measure(word: str) -> dict[str, int] | None:
    """{full name: power} of a unit of measurement: {"meter": 1} for m, metre and meters; None for any other word."""
    if name := SYMBOLS.get(word):
        return {_full(name): 1}
    lower = word.casefold()
    if lower in _ANY_CASE and (name := SYMBOLS.get(lower)):
        return {name: 1}
    for singular in (lower, lower.removesuffix("s")):
        if singular in _COMPOUND:
            return _COMPOUND[singular]
        if name := NAMES.get(singular):
            return {_full(name): 1}
    return _COMPOUND.get(word)


def _full(name: str) -> str:
    return NAMES.get(name, name)
