"""What may stand after a number as its unit, and what would change its value; times, money and choices.

A unit on one side only is ignored; two different units differ. The words of CHANGING never pass for a unit.
"""

from __future__ import annotations

import pytest

from dphrl.rewards.math_compare import compare
from dphrl.types import RewardStatus
from tests.unit.answer_pairs import both_ways

# After the number 5 none of these leaves it 5.
CHANGING = {
    "multiples": r"""
        dozen | dozens | half dozen | gross | great gross | score | scores | pair | pairs | couple | couples | brace |
        trio | duo | quartet | hundred | hundreds | thousand | thousands | million | millions | mn | mil | mill |
        billion | billions | bn | trillion | tn | quadrillion | quintillion | sextillion | zillion | googol | lakh |
        lakhs | lac | crore | crores | arab | myriad | k | K | M | B | T | G | MM | kilo | mega | giga | tera | milli
        | micro | nano | pico | centi | deci | deca | grand
    """,
    "parts": r"""
        half | halves | third | thirds | quarter | quarters | fourths | fifth | fifths | sixths | sevenths | eighths |
        ninths | tenth | tenths | elevenths | twelfths | thirteenths | fifteenths | sixteenths | twentieths |
        thirty-seconds | hundredth | hundredths | thousandths | ten-thousandths | millionths | billionths |
        trillionths | percentile | per mille | permille | per mil | ‰ | per thousand | per hundred | per million |
        parts per million | ppm | ppb | basis points | bps | bp
    """,
    "operations, powers, bases": r"""
        double | doubles | doubled | triple | triples | tripled | treble | quadruple | quadrupled | quintuple |
        twofold | threefold | fold | tenfold | times | times two | times ten | times as many | times more | times x |
        squared | cubed | square | cube | square root | square roots | cube root | cube roots | root | roots of 2 | th
        root | nd root | rd root | th power | nd power | to the fourth | to the power of two | to the fifth power |
        factorial | double factorial | reciprocal | inverse | inverted | negated | negative | negatives | minus |
        minus one | minus six | plus | plus one | plus or minus one | and a half | and a quarter | and a third | and
        two thirds | and one half | and three quarters | point five | point 5 | point two five | over two | over 2 |
        over six | divided by two | divided by 2 | divided by x | by six | by two | by 6 | out of six | out of ten |
        in six | in 6 | of six | of 6 | to six | to one | to 6 | into six | modulo 7 | mod 7 | mod seven | mod | (mod
        7) | remainder 2 | remainder two | r 2 | R 2 | R2 | r2 | c2 | base eight | base 8 | base two | in base 7 | in
        base two | in binary | binary | hex | hexadecimal | octal | in octal | yards left | rates of six | feet in
        debt | hours minus one
    """,
    "comparisons and directions": r"""
        below zero | below | degrees below zero | degrees below | under zero | under par | below par | above six |
        less | less than six | fewer | fewer than 6 | more | more than six | short | short of 6 | short of six | shy
        of ten | away from six | from six | or more | or less | or fewer | or six | or so | at least | at most |
        maximum | minimum | max | approximately | about | roughly | ish | maybe | perhaps | not | is wrong | is not
        right | is incorrect | wrong | not 6 | BC | BCE | B.C. | AD | ago | years ago | feet below sea level | meters
        below sea level | dollars in debt | in debt | debt | loss | dollars lost | dollars short | overdrawn | deficit
        | deficient | owed | dollars owed | down | up | left | units left | steps left | units to the left | steps
        backwards | units down
    """,
    "rests of sentences and of formulas": r"""
        apples and six oranges | apples and 6 oranges | apples or six | dozen eggs | dozen apples | hundred apples |
        tenths of a mile | half miles | quarter miles | hundredths of an inch | million dollars | thousand dollars |
        tens | ones | units of ten | hundred meters | thousand km | score years | gross pens | dozen cm | percent of
        six | percent of 10 | % of 20 | percent more | times larger | x | y | n | ab | xy | xyz | pi | \pi | e | i |
        n! | infinity | zero | one | six | five | nil | null | and | and six | , 6 | , six | ; 6 | ; six | - 1 | + 1 |
        ! | ^2 | ^{2} | ^{-1} | _2 | ' | '' | ..6 | ... | /6 | / 2 | : 6 | :6 | = 6 | \neq 6 | sin | log | ln 2 | log
        2 | cm or 6 cm | cm + 1 cm | cm - 1 cm | cm and 6 mm | m n | m x | xm | gs^2 | mod m | choose 2 | C 2 | P 2 |
        nCr | permutations of six | sq | cubic | square meters per | per | / | meters times two | m*2 | exponent | to
        the n | nth | th | in the third power | quarts and a half | hours and a half | apples per dozen | dollars per
        dozen | cents per hundred | shillings and sixpence | binary digits of six | figure | figures | figure salary |
        digit number | star | decimal | decimal places | repeating | recurring | degrees west | degrees south |
        degrees negative | minutes to six | past six | minutes past six | to | quarter past | half past | oclock minus
        one | am tomorrow plus 1 | th of May | centuple | octuple | decuple | halved | quartered | percentages of six
        | sixes | fives | tens of thousands | hundreds of apples | thousands of people | millions of dollars | dozens
        of eggs | scores of people | pairs of shoes | couples of days | hundredweight | baker's dozen | bakers dozen |
        nonillion | octillion | septillion | decillion | thou | oct | bin | imaginary | imaginary units | conjugate |
        complement | supplement | modulus | absolute value | squares of six | powers of two | power | powers |
        multiples of six | multiples | factors of six | products | sums | times table | fraction | ratio | to one
        ratio | to one odds | odds | chance in six | chances in six | in a row | straight | x 10^3 | x 10 | times ten
        cubed | E3 | e3 | e-3 | exp | kk | km^0 | cm^9 | m^{x} | cm^x | \cdot 2 | \cdot 2 cm | \times 3 | \div 2 |
        \frac{1}{2} | \frac12 cm | 1/2 | 1/2 cups | 6 | 6 cm | 0 | 00 cm | apples short | too many | over par | and
        counting | groups of ten | bags of a dozen | weeks from now | minutes late | degrees colder | times a day |
        percent off | dollars off | squared units | cubed apples | half hours | of a kind | of hearts | D | X | CE |
        in hex | cents on the dollar | parts | k | ten thousandths | raised to two | sixty-fourths | degrees west | °S
        | S | E | in the red | per two hours | per 2 hours | m/(2 s) | m//s | cm/0 | m^-
    """,
}  # fmt: skip

# All of these leave 5 what it is.
UNITS = {
    "symbols": r"""
        cm | mm | km | m | dm | nm | kg | g | mg | L | mL | ml | s | ms | h | hr | hrs | min | mins | sec | secs | ft
        | in | in. | yd | mi | lb | lbs | oz | gal | pt | qt | N | J | W | V | Hz | kHz | MHz | GHz | Pa | kPa | kJ |
        kW | kWh | MB | GB | KB | eV | mol | mph | km/h | m/s | m/s^2 | m/s² | m/s/s | ft/s | ft/min | mi/h | g/mL |
        kg/m^3 | kg/L | g/cm^3 | cm^2 | m^2 | cm² | m³ | cm^{3} | km^2 | ft^2 | in^2 | sq ft | sq. ft. | sq. in. | sq
        m | cu ft | cu. ft. | sqft | cc | cm3 | N m | N·m | mol/L | rpm | psi | dB | ha | kcal | cal | °C | °F | ° | ¢
        | € | USD | EUR | rad | deg | a.m. | p.m. | AM | o'clock | N-m | kg·m²/s² | mi/hr | J/(kg K)
    """,
    "units of measurement": r"""
        centimeters | centimetres | meters | meter | metres | kilometers | kilometre | millimeters | micrometers |
        nanometers | inches | inch | feet | foot | yards | miles | light years | light-years | nautical miles | grams
        | kilograms | kilos | milligrams | pounds | ounces | tons | tonnes | metric tons | liters | litres |
        milliliters | gallons | quarts | pints | cups | tablespoons | teaspoons | fluid ounces | seconds | second |
        minutes | hours | hour | days | weeks | months | years | decades | centuries | years old | days long | feet
        tall | feet long | inches wide | miles away | meters high | acres | hectares | degrees | degrees Celsius |
        degrees Fahrenheit | degrees C | degree | radians | square units | sq. units | sq units | units | unit |
        units^2 | units squared | units² | cubic units | cubic centimeters | cubic feet | cubic meters | square feet |
        square meters | square inches | square miles | square kilometers | inches squared | meters squared |
        centimeters cubed | meters per second | metres per second | miles per hour | kilometers per hour | kilometres
        per hour | feet per second | meters per second squared | meters per second per second | miles an hour | miles
        per gallon | dollars per hour | dollars an hour | dollars a day | cents per pound | dollars per person |
        dollars per pound | pages per day | apples per day | people per car | students per class | gallons per minute
        | words per minute | revolutions per minute | watts | joules | newtons | volts | amps | hertz | pascals | ohms
        | kilowatts | kilowatt-hours | kilowatt hours | foot-pounds | newton-meters | newtons per meter | bits | bytes
        | megabytes | calories | kilocalories | moles | kelvins
    """,
    "money": r"""
        dollars | dollar | cents | US dollars | euros | yen | yuan | rupees | pesos | pounds sterling | bucks | francs
        | percentage points | dollars each | cents each | dollars total | dollars in total
    """,
    "things that are counted": r"""
        apples | oranges | bananas | marbles | students | people | children | men | women | boys | girls | teachers |
        friends | players | teams | ways | handshakes | games | matches | books | pages | pencils | pens | cookies |
        candies | pieces | pieces of candy | slices | slices of pizza | cakes | pizzas | eggs | birds | dogs | cats |
        cows | chickens | horses | rabbits | fish | sheep | trees | flowers | roses | cars | trucks | buses | boxes |
        bags | bottles | bottles of water | cans | jars | cups of flour | cups of coffee | gallons of water | pounds
        of potatoes | kilograms of rice | bags of rice | tickets | stamps | coins | dimes | nickels | pennies | red
        marbles | blue balls | green apples | chocolate bars | ice cubes | tennis balls | different ways | distinct
        ways | possible ways | possible outcomes | outcomes | permutations | combinations | arrangements | committees
        | subsets | functions | paths | solutions | real solutions | integer solutions | positive integer solutions |
        real roots | distinct real roots | roots | integers | positive integers | prime numbers | primes | divisors |
        positive divisors | factors | terms | digits | numbers | three-digit numbers | ordered pairs | pairs of
        integers | ordered triples | elements | points | lines | triangles | squares | cubes | unit cubes | unit
        squares | rectangles | sides | edges | vertices | faces | diagonals | regions | intersections | intersection
        points | lattice points | values | values of x | zeros | trailing zeros | letters | words | sentences | houses
        | rooms | floors | tables | chairs | seats | rows | columns | shirts | shoes | hats | toys | balloons | balls
        | cards | dice | rolls | flips | tosses | trips | laps | rounds | steps | stairs | questions | problems |
        goals | votes | voters | members | guests | workers | employees | customers | passengers | visitors | families
        | groups | classes | weeks in total | apples left | marbles remaining | students in total | apples total |
        songs | movies | photos | stickers | ribbons | beads | necklaces | bracelets | bricks | tiles | planks | nails
        | screws | push-ups | sit-ups | miles per day | shares | dresses | knives | loaves of bread | leaves | wolves
        | mice | geese | puppies | kittens | berries | strawberries | potatoes | tomatoes | sandwiches | peaches |
        cherries | burgers | donuts | hours of sleep | minutes of exercise | hours per week | hours per day | days per
        week | servings | calories per serving | tablespoons of sugar | additional apples | t-shirts | x-intercepts |
        gallons left | cups of sugar | atoms
    """,
}  # fmt: skip

SAME = {
    "times": [
        ("9:30 AM", "9:30"), ("9:30 AM", r"9:30\text{ a.m.}"), ("9:00 AM", "9 AM"), ("9:30 AM", "9:30AM"),
        ("9:30", r"\text{9:30 a.m.}"), ("9:30 PM", "21:30"), ("12:00 PM", "noon"), ("12 PM", r"\text{noon}"),
        ("12:00 AM", "midnight"), ("3:00 PM", r"3\text{ p.m.}"), ("3:00", "3 o'clock"),
        (r"4:30\text{ PM}", "4:30 P.M."), ("4:30 p.m.", r"\text{4:30 in the afternoon}"), ("09:30 AM", "9:30 a.m."),
        (r"9{:}30\text{ AM}", "9:30"), ("9:30 AM", "9:30~AM"), (r"9\!:\!30 \text{ AM}", "9:30 AM"),
        ("10:15 am", "10:15 AM"), ("12 noon", "12:00 PM"), ("2: 15 PM", "2:15 p.m."), ("9:30 AM", "9{:}30"),
    ],
    "amounts in several units": [
        ("3 hours 20 minutes", r"3\text{ hours and }20\text{ minutes}"),
        ("3 hours and 20 minutes", r"\text{3 hours 20 minutes}"), ("3 h 20 min", "3 hours, 20 minutes"),
        ("5 feet 11 inches", "5 ft 11 in"), (r"5\text{ ft }11\text{ in.}", "5 feet and 11 inches"),
        ("2 weeks, 3 days and 4 hours", r"2\text{ weeks }3\text{ days }4\text{ hours}"),
        ("5 dollars and 25 cents", r"5\text{ dollars }25\text{ cents}"), ("1 hour 30 minutes", "1 hr. 30 min."),
        (r"3\,\mathrm{h}\,20\,\mathrm{min}", "3 hours 20 minutes"),
    ],
    "choices": [
        ("C", "(C) 5"), ("(C) 5", "C) 5"), (r"\textbf{(C)}\ 5", "C"), (r"\textbf{(C) }5", "(C)"), ("option (C)", "C"),
        ("answer choice C", "C"),
        ("choice C", "C"), ("c)", "C"), ("(c) 5", "C"), ("[C]", "C"), ("(C) (1,2)", "(1,2)"), ("(C) (1,2)", "C"),
        ("(b) 5", "(B)"), ("(c)", "C"), ("Option C", "(C)"), ("(C) 5", "5"), ("5", r"\text{(C) } 5"), ("C. 5", "C"),
        ("C: 5", "C"), ("The correct answer is (C)", "C"), ("option c", "C"), ("(C)5", "C"),
        (r"\text{C) } \frac{1}{2}", "0.5"), (r"(C) \frac12", "(C) 0.5"), ("(C) -5", "-5"), ("(C) Evelyn", "C"),
        ("(C) Evelyn", "Evelyn"), (r"\text{Option C}", "C"), ("C is correct", "C"), ("answer: C", "C"),
        ("(C) 5 cm", "5 cm"), ("(C) 5 cm", "5"), ("A,C", "C, A"), ("(A) and (C)", "A, C"), ("(C).", "C"),
    ],
    "words": [
        ("no solution", "no solutions"), (r"\text{No solutions}", "no solution"), ("infinity", r"\infty"),
        ("-infinity", r"-\infty"), ("negative infinity", r"-\infty"), (r"\text{infinity}", r"+\infty"),
        ("DNE", "does not exist"), ("(5, infinity)", r"(5,\infty)"),
        (r"\text{no solution}", "There are no solutions."), ("infinitely many", "infinitely many solutions"),
    ],
    "money": [
        ("USD 18.90", "18.90"), ("¥5", "5"), ("₹5", "5"), ("5 ¢", "5"), ("5 ¢", "5 cents"), ("€5", "5 euros"),
        ("5€", "€5"), ("£5", "5 pounds"), (r"\pounds 5", "£5"), ("Rs. 500", "500"), (r"\text{Rs. }500", "₹500"),
        ("US$5", r"\$5"), ("5 USD", r"\$5"), (r"\$5", "5 dollars"), (r"-\$5", "-5"), (r"\$-5", "-5"), (r"$\$5$", "5"),
        ("$5$", "5"), (r"\$5 per hour", "5 dollars per hour"), (r"\$5/\text{hour}", "5"), (r"\$1,234.50", "1234.5"),
        (r"\$2.5\text{ million}", "2500000"), ("$5.00", "5"), (r"\text{\$}5", "5"), (r"\$\frac12", "0.5"),
        (r"5\$", "5"), ("EUR 5", "5 euros"), ("€1.50", "1.5"), (r"\$ 5", "5"), (r"A\$5", "5"),
        ("A$5", "5 Australian dollars"),
    ],
    "units": [
        ("km/h", "km/h"), ("5 km/h", "5 kilometers per hour"), ("5 m/s", r"5\ \mathrm{m\,s^{-1}}"),
        ("5 m/s", r"5\text{ m s}^{-1}"), ("5 mph", "5 miles per hour"), ("5 mi/h", "5 mph"),
        ("5 cm^2", "5 square centimeters"), ("5 square feet", "5 sq. ft."), ("5 sq ft", r"5\text{ ft}^2"),
        ("5 cc", r"5\text{ cm}^3"), ("5 N m", r"5\,\mathrm{N\cdot m}"),
        (r"5\,\mathrm{m/s^2}", "5 meters per second squared"), (r"5\frac{\text{m}}{\text{s}}", "5 m/s"),
        ("5 apples", "5 red apples"), ("20°C", r"20^\circ"), ("20 degrees Celsius", "20°C"),
        ("5 people per car", "5"), ("5 ounces", "5 fluid ounces"), ("5 lbs", "5 pounds"),
        ("5 gallons", "5 gallons of water"), ("5 kWh", "5 kilowatt-hours"), (r"5\ \mu\text{m}", "5 micrometers"),
        (r"5\,\Omega", "5 ohms"), (r"5\ \text{k}\Omega", r"5\text{ kilohms}"), ("5 dozen", "60"),
        ("5 lakh", "500000"), ("5 crore", "50000000"), ("5 hundred thousand", "500000"),
        ("2 million dollars", r"\$2,000,000"), (r"$\frac{1}{2}$ cup", "0.5"), ("1/2 mile", "0.5"),
        ("2 1/2 hours", "2.5 hours"), (r"4 \frac{4}{9}$ days", r"\frac{40}{9}"), ("1 apple", "1"),
        (r"\text{5 cm}", "5"), (r"\mathrm{5\,cm}", "5"), (r"5\ \mathrm{cm}", "5cm"), ("5 m", "5 meters"),
        (r"5~\text{m}", "5"), (r"5\,\text{m}", "5 m"), (r"864 \mbox{ inches}^2", "864 square inches"),
        (r"10^{-3}\text{ mol/L}", "0.001"), (r"6.02\times10^{23}\text{ atoms}", "6.02e23"),
        (r"6\sqrt3\text{ units}", r"6\sqrt3"), (r"5\sqrt{2}\ \text{m}", r"5\sqrt2"), (r"50\%", "50 percent"),
        ("50 percent", "0.5"), (r"5,000\text{ people}", "5000"), (r"(3\text{ cm}, 4\text{ cm})", "(3,4)"),
        (r"3\text{ cm}, 4\text{ cm}", "3, 4"), (r"x=5\text{ cm}", "5"), (r"4\pi \text{ square units}", r"4\pi"),
        (r"4\pi\ \mathrm{cm}^2", r"4\pi"), (r"12 \text{ m}^{2}", "12"),
        (r"3 \text{ hours } 20 \text{ min}", "3 hours 20 minutes"), (r"30^\circ", "30 degrees"),
        (r"5\text{ }\text{cm}", "5 cm"), (r"5\text{ cm}\text{ per }\text{s}", "5 cm/s"),
        (r"3 \text{ and } 4 \text{ cm}", "3,4"), (r"5\cdot 10^3 m", "5000"), ("5m/s", "5"), ("20 m", "20"),
        ("5 psi", "5 lb/in^2"), (r"\textdollar 5", r"\$5"),
    ],
}  # fmt: skip

DIFFERENT = {
    "times": [
        ("14:30", "2:30"), ("9:30 AM", "9:30 PM"), ("9:30", "9:45"), ("9 AM", "9 PM"), ("9:00 AM", "10 AM"),
        ("12:00 AM", "12:00 PM"), ("noon", "midnight"), ("9:30 AM", "8:30"), ("14:30", "2:30 AM"), ("9:30 AM", "930"),
        ("0:30", "12:30 PM"), ("2:3", "2:30"), ("9:30 AM", "9.3"), ("21:30", "9:30 AM"),
    ],
    "amounts in several units": [
        ("3 hours 20 minutes", "3 hours 30 minutes"), ("3 hours 20 minutes", "3 minutes 20 hours"),
        ("3 hours 20 minutes", "3"), ("3 hours 20 minutes", "20"), ("3 hours 20 minutes", "3 hours"),
        ("5 feet 11 inches", "5 feet 11 meters"), ("5 feet 11 inches", "511"),
        ("3 hours 20 minutes", "3 hours 20 seconds"),
    ],
    "choices": [
        ("(C) 5", "(D) 5"), ("(C) 5", "D"), ("(C) 5", "6"), ("(C) 5", "(C) 6"), ("C", "D) 5"), ("option C", "D"),
        ("(a) 5", "5"), ("A is odd, B is even", "A"), ("(2, 3) m", "(2, 3)"), (r"90^\circ - C", "90"),
        ("(a)b", "(a)"), ("(a) b", "(a)"), ("(A)B", "(A)"), ("(A)(B)", "(A)"), ("(a)", "A+1"),
        ("c", "(C) 5 c"), ("c)", "D"), ("[c, d]", "C"), ("(c) 5", "(D) 5"),
        ("(c)", "D"), ("(a)", "b"), ("C", "(C) + 5"), ("(C) and (D)", "C"), ("(C), (D)", "C"), ("C", "C=5"),
        ("(C)(D)", "C"), ("A", "A^2"), ("A", "A_1"), ("C", "C-5"), ("C", "not C"), ("C", "neither C nor D"),
        ("C", "C or D"), ("5", "(C)"), ("(x)", "X"), ("5", "(A) 5 (B) 6"), ("option C", "option D"),
        ("C", "option CD"), ("ABC", "A"), ("(C) 5", "C 6"),
    ],
    "words": [
        ("no solution", "one solution"), ("no solution", "2 solutions"), ("no solution", "solutions"),
        ("infinity", r"-\infty"), ("no real solution", "no solution"), ("infinity", "5"),
        ("infinitely many", "infinity"), ("no solution", "infinitely many solutions"),
    ],
    "money": [
        ("¥5", "₹5"), ("€5", r"\$5"), ("5 ¢", r"\$5"), ("£5", "€5"), ("USD 5", "EUR 5"), ("5 USD", "5 EUR"),
        (r"\$5", "6"), (r"\$5", r"5\%"), (r"\$5k", "5"), (r"\$5\text{ million}", "5"), ("¥5", "6"),
        (r"A\$5", r"C\$5"), (r"\$5,000", "5"), ("$5 and $6", "5"), (r"\$5 per hour", "5 dollars per day"),
        (r"\$5", "5 euros"), ("USD", "5"), ("$5x", "5"), (r"\$0.05", "5 cents"),
    ],
    "units": [
        ("5 cm", "5 m"), ("5 km/h", "5 m/s"), ("5 m/s", "5 m s"), ("5 m", "5 m^2"), ("5 cm^2", "5 cm^3"),
        ("5 square feet", "5 feet"), ("5 apples", "5 oranges"), ("5 red apples", "5 green apples"), ("20°C", "20°F"),
        ("5 miles", "5 kilometers"), ("5 g", "5 kg"), ("5 mg", "5 kg"), ("5 pounds", "5 ounces"), ("5 N", "5 J"),
        ("5 N m", "5 N/m"), ("5 hours", "5 minutes"), ("5 students", "5 teachers"), ("5 mm", "5 MM"),
        ("5 apples", "6 apples"), ("5 kW", "5 kWh"), ("5 mL", "5 L"), ("5 days", "5 dollars"), ("5m", "5"),
        ("5x", "5"), ("5 x", "5"), ("5s", "5"), ("5g", "5"), ("5mn", "5"), ("5pt", "5"), ("5mA", "5"), ("5ab", "5"),
        ("5 ab", "5"), ("5 xm", "5"),
        ("5 m", "6 m"), ("5 m + 3", "8"), ("2 + 3 m", "5"), ("5^2 m", "5"), ("5 m^4", "5"), ("x m", "x"),
        ("x cm", "x"), ("ab", "a"), ("4m", "4"), ("3m^2", "3"), ("3 x^2", "3"), ("5 s^2", "5"), ("5 mx", "5"),
        ("m", "1"), ("5 dozen", "5"), ("5 lakh", "5"), ("-5 m", "5"), ("5 apples", "-5"), ("5 sin", "5"),
        ("5 dx", "5"), ("5 cm 6 mm", "5"), ("5 cm", "6"), ("5 sevenths", "5"), ("1 half", "1"), ("1 half", "0.5 cm"),
        ("1 third", "1"), ("1 dozen", "1"), ("1 pair", "1"), ("1 double", "1"), ("1 root", "2"), ("1/2 dozen", "0.5"),
        ("0.5 million", "0.5"), ("3 to 5 apples", "3"), ("3-5 apples", "5"), ("5 apples or 6 apples", "5"),
        ("5 apples, 6 oranges", "5"), ("5 and 6 apples", "6"), ("5 or 6 cm", "6"), (r"\pm 5 \text{ cm}", "5"),
        (r"<5\text{ cm}", "5"), (r">5\text{ cm}", "5"), ("5 cm", "50 mm"), (r"5\text{ cm} \times 6 \text{ cm}", "5"),
        (r"5\text{ cm} \times 6 \text{ cm}", "6"), (r"\frac{5\text{ cm}}{2}", "5"), (r"2^{5\text{ cm}}", "32 m^3"),
        (r"5\text{ cm}^0", "5"), ("5%", "5 cm"), ("5‰", "5"), ("5 °F below zero", "5"),
        (r"5^\circ\text{ below zero}", "5"), (r"5^\circ 30'", "5"), ("5 degrees 30 minutes", "5"),
        ("5 years ago", "5"), ("50%", "50 cm"), ("50%", "5"), ("5 percent", "5 percentage points"),
    ],
}  # fmt: skip


def phrases(table: dict[str, str]) -> list[str]:
    return [phrase.strip() for kind in table.values() for phrase in " ".join(kind.split()).split(" | ")]


def spellings(phrase: str) -> list[str]:
    plain = [f"5 {phrase}"]
    return plain if "\\" in phrase else [*plain, rf"5\text{{ {phrase}}}", rf"5\ \text{{{phrase}}}"]


@pytest.mark.parametrize("phrase", phrases(CHANGING))
def test_words_that_change_the_value_are_no_unit(phrase: str) -> None:
    for spelling in spellings(phrase):
        assert compare(spelling, "5").status is not RewardStatus.CORRECT, spelling
        assert compare("5", spelling).status is not RewardStatus.CORRECT, spelling


@pytest.mark.parametrize("phrase", phrases(UNITS))
def test_a_unit_on_one_side_is_ignored(phrase: str) -> None:
    for spelling in spellings(phrase):
        assert compare(spelling, "5").status is RewardStatus.CORRECT, spelling
        assert compare("5", spelling).status is RewardStatus.CORRECT, spelling
        assert compare(spelling, "6").status is not RewardStatus.CORRECT, spelling


@pytest.mark.parametrize(("answer", "gold"), both_ways(SAME))
def test_the_same(answer: str, gold: str) -> None:
    assert compare(answer, gold).status is RewardStatus.CORRECT


@pytest.mark.parametrize(("answer", "gold"), both_ways(DIFFERENT))
def test_different(answer: str, gold: str) -> None:
    assert compare(answer, gold).status is not RewardStatus.CORRECT
