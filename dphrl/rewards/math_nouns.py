"""The things that answers count: "5 apples", "240 ways", "12 students".

A word after a number passes as a unit only if it stands here or in `math_unit_table`, because too many words change
the value of the number: dozen, tenths, below zero. The nouns were read off the questions of GSM8K, SVAMP and MATH
("How many ... ?", "12 ...") and completed by those of counting problems. No word belongs here that could change a
value: no pair, couple, half, quarter, fold, power, base, decimal, figure, debt, loss, time.
"""

from __future__ import annotations

_PEOPLE = """
actor adult applicant artist athlete attendee baby bartender boy brother builder burglar buyer camper candidate
captain carpenter cashier cheerleader chef child citizen classmate clerk client clown coach colleague collector
competitor cook cousin customer cyclist dancer daughter delegate democrat dentist designer diner doctor driver eater
employee engineer family fan farmer father finalist firefighter fisherman follower freshman friend gardener girl
golfer grader graduate grandchild granddaughter grandson guest guide hiker homeowner house household inspector
investor judge juror kid kindergartner kitten knight lady lawyer leader learner liar librarian logician man manager
mathematician member mother musician neighbor neighbour nephew niece nurse officer owner painter parent participant
partner passenger patient patron person pilot pirate player plumber policeman politician professor programmer pupil
racer reader resident rider roommate runner sailor scientist secretary senator senior shopper sibling singer sister
skater soldier son sophomore spectator staff student subscriber supporter surfer survivor swimmer teacher teammate
teen teenager tenant toddler tourist trader uncle user villager visitor volunteer voter waiter waitress wife winner
woman worker writer
"""

_ANIMALS = """
alligator animal ant bat bear bedbug bee beetle bird bug bull bunny butterfly calf camel cat caterpillar chick chicken
chihuahua clam clownfish cow coyote crab creature cricket crocodile crow cub deer dinosaur dog dolphin donkey dove
dragon dragonfly duck duckling eagle elephant emu falcon fish flea fly fox frog gazelle gecko giraffe goat goldfish
goose gorilla grasshopper guppy hamster hatchling hawk hen herd horse insect jellyfish kangaroo koala ladybug lamb
leopard lion lizard llama lobster maggot minnow monkey monster mosquito moth mouse mule newborn octopus ostrich owl ox
oyster panda parrot peacock pelican penguin pet pig pigeon piglet pony poodle pufferfish pup puppy python rabbit
raccoon rat rhino robin rooster salmon seagull seal shark sheep shrimp skunk snail snake sparrow spider squirrel
starfish stork swan tadpole tarantula tiger toad toucan trout tuna turkey turtle unicorn vampire weasel whale whisker
wolf wombat worm zebra zombie
"""

_FOOD = """
appetizer apple apricot avocado bacon bagel baguette banana bean beer berry beverage biscuit blueberry bread breakfast
brownie bun burger burrito cabbage cake candy cantaloupe carrot cheese cheesecake cherry chickpea chip chive chocolate
churro clove coconut coffee cone cookie corn cracker cranberry croissant cucumber cupcake dessert dinner donut
doughnut drink dumpling egg eggplant entree fillet flour food fruit fry grain grape hamburger honeydew hotdog
ingredient jelly jellybean juice kernel kiwi latte leaf lemon lemonade lime loaf lollipop lunch macaron mango
marshmallow meal meat meatball melon milk milkshake mint muffin mushroom nectarine noodle nut oil olive omelet onion
orange pancake papaya parsnip pasta pastry pea peach peanut pear pepper pickle pie pineapple pistachio pizza plum
popcorn popsicle potato pretzel puff pumpkin radish raisin raspberry recipe rice roll salad salt sandwich sausage
scoop seasoning serving shake slice smoothie snack soda soup spice sprig steak strawberry sugar sundae sweet taco
tangerine tea tomato topping treat vegetable waffle walnut water watermelon wine yam yogurt yolk
"""

_OBJECTS = """
acorn airplane anklet antacid apron badge bag ball balloon bandage bar barrel basket basketball bat bathtub battery
bead beaker bed bell belt bicycle bike bill binder blanket blind block blouse board boat bolt bone book bookcase
bookmark bookshelf boot bottle bouquet bow bowl box bracelet brick brochure broom brush bucket bulb bus button cabinet
cage camera can candle cap capsule car card carnation carpet carriage cart carton case cassette cd chain chair charger
chest chicken clip clock cloth coat coin comic computer container cookbook cot couch crate crayon crystal cube cup
curtain cushion daisy decoration desk device diamond diaper dice die dime disc dish doll dollhouse domino door drawer
drawing dress drill drone drop drum dvd earring engine envelope eraser fan feather fence figurine firecracker firework
flag flashlight flower flowerpot flute flyer folder fork frame game garment gem gemstone gift glass glasses glove
gnome goblet guitar gumball gun hammer hanger hat headband headphone helmet highlighter hook hose hubcap icicle
invitation jacket jar jean jersey jewel jug kettle key keyboard keychain kite knife ladder lamp lantern laptop legging
lego lens letter lever lid light lightbulb lily lipstick lock locker machine magazine magnet mailbox mansion map
marble marigold marker mask mat matchstick mattress medal microphone mirror mitten model monitor motorcycle mug nail
napkin necklace needle newspaper nickel note notebook notepad novel orchid ornament outfit oven package packet pad
paddle paint painting pajamas pallet pamphlet pan panel pant paper paperback paperclip parcel pearl pebble pedal pen
pencil penny petal phone photo photograph piano picture pill pillow pin pinecone pipe pitcher plane plank plant
planter plate plug portrait poster pot present printer pump purse puzzle quilt racket record remote ribbon ring robot
rock rocket rod rope rose ruler rung sack sail sapling scarf screen screw sculpture seashell seed seedling sequin
shell shingle ship shirt shoe shoelace shovel sign skirt sled slipper snowball snowflake snowman sock sofa spear spoke
sponge spoon sprinkler stake stamp stapler statue stem stick sticker stocking stone stool strap straw string suit
suitcase sunflower sweater sweatshirt sword t-shirt table tablet tank tape teabag teacup teddy tee-shirt television
tent textbook thread ticket tie tile tire tissue toilet token tool toothbrush toothpick towel toy tractor train tray
treasure tree tricycle trophy trouser truck trumpet tube tulip tv twig umbrella uniform van vase vehicle vessel vest
video wagon wallet washcloth washer watch weed wheel whistle widget window wipe wire wreath
"""

_PLACES_AND_PARTS = """
aisle apartment aquarium area arm attic balcony barn bathroom beach bedroom bench bin blackboard branch bridge
building bush cabin campsite castle cavern cavity ceiling cell channel chapter church city classroom closet column
corner counter country county court craft crater deck department district driveway ear edge eye farm field finger flat
floor garage garden gate grave hall hallway hand harbor head hive hole home hotel house intersection island kitchen
lab lake lane leg level library lifetime line locker mall market mountain mouth museum neck nest office orchard oven
page panel paragraph park patch path planet platform plot pond pool porch post province region restaurant ridge river
road roof room route row school sea seat section sector shelf shop side sidewalk site skyscraper slot spot stadium
stage stair staircase stall star state station step stop store story street stump suite tail tattoo theater toe tooth
tower town track trail village vine wall warehouse wing workshop world yard zone
"""

_GROUPS_AND_EVENTS = """
accident activity ad album app appointment article assignment attempt award band batch beat bite bloom bottlecap
bounce break bubble bunch bundle business call case catch category change chore circle class click cloud clover club
clue cluster coat collection color colour comment committee company concert contest copy course crop crunch cycle
delivery demerit deposit discussion dive document dot download drill duel email episode error event exam exercise
experiment feature file film flight flip gallery generation goal grade group haircut hike hit homer homework hop idea
inning instance interview issue item jar job jogger journey jump jumping kick kick-up kill kind knockout lap layer
league lesson lick list load look loop mail match measurement meeting message minigame mission mistake move movie
necktie news night object offer operation option outcome pack paintball party pass patient phase piece pile pitch play
playlist poem point portion postcard practice presentation prize problem process program project proposal puff pull-up
push-up pushup question quiz race reader rebound rehearsal repetition report request response riddle ride round run
sale sample scene season segment selfie sentence sequel serving session set share sheet shift shipment shot show
shower sighting sit-up situp skill skip sleepover song sonnet sound species speech spell spin sport stack stage
statement stitch strand strategy stretch strike stripe stroke style subject supply survey swap symbol symptom system
task team test text thing throw ticket title topic toss touchdown tour tournament trade transaction treatment trial
trick trip turn tutorial type vacation variety verse version vibration victory visit vote walk wave website week
weekday weekend win wish word workday workout wrapper
"""

_MATHEMATICS = """
angle arc arrangement assignment asymptote atom axis bacterium bijection bishop box-and-whisker cell choice chord
circle code coefficient color coloring colouring combination component configuration consonant coordinate cube cuboid
cut cycle cylinder derangement diagonal diagram digit disk distribution divisor edge eigenvalue electron element
ellipse entry equation event extremum face factor factorization function game generator graph grouping handshake
heptagon hexagon homomorphism hyperbola inflection integer intercept intersection interval ion isomorphism labeling
labelling lattice layout letter line matrix median molecule neutron node number numeral octagon ordering orientation
palindrome parabola parallelogram parameter particle partition password path pattern pawn pentagon permutation photon
piece plane point polygon polyhedron polynomial position possibility prime prism proton pyramid quadrilateral quantum
queen rectangle reflection region residue rhombus rook root rotation route row scenario seating segment selection
semicircle sequence set side solution space sphere square state step string subgroup subset surface symmetry tangent
term tetrahedron tiling tournament trapezoid tree triangle triangulation unit-cube value variable vertex vowel walk
way word x-intercept y-intercept zero
"""

# Nouns without a plural of their own: "5 fish" and "5 people" are as usual as "5 apples".
_SAME_IN_PLURAL = """
aircraft bacon candy cattle clothing corn deer dice fish food fruit goldfish homework jellyfish kin mail paper people
salmon sheep shrimp spacecraft species staff trout tuna
"""

# What follows "of", as in "3 gallons of water"; alone it is no unit.
_SUBSTANCES = """
acid age air alcohol aluminum ammonia area bamboo batter beef birdseed blood broccoli butter cabbage canvas cement
chalk charcoal cheese chicken chocolate clay cloth clothing coal coffee concrete copper corn cotton cream data diesel
dirt distance dough driving electricity energy exercise fabric fat feed fencing fertilizer fiber flooring flour food
frosting fudge fuel garbage gas gasoline gold grass gravel groceries guacamole gum hair hay height helium homework
honey hydrogen ice iron jam juice junk kombucha lace land laundry lava lead leather lemonade length lettuce liquid
lumber mail maize mass material mayonnaise meat medicine metal milk mixture money mud mulch oatmeal oats oil oxygen
paint paper parsley pasta peanut-butter plastic pork powder practice protein punch rain reading rice rope rubber rum
running salt sand sauce sauerkraut seasoning shampoo silk silver sleep snow soap sod sodium soil solution soup
sprinkles steel studying sugar sunscreen syrup tea time tin training trash travel uranium vinegar volume wallpaper
waste water wax weight wheat wine wood wool work yarn
"""

# Words before a noun that leave its number as it is. "Negative" and "double" do not.
_ADJECTIVES = """
action acute additional adjacent adult african algebraic american antique arithmetic available baby bad baked bar
barnyard baseball beautiful big birthday black blank blue boiled bonus brand brass bright broken bronze brown burnt
cardboard ceramic cheap circular clean closed cold colored common complete complex concert congruent consecutive
convex corner correct cotton critical cubic daily damaged dark deluxe diet different digital disjoint distinct
distinguishable dry electric empty equilateral even exact extra extraneous fake female final first-class five-digit
flat football foreign four-digit free french fresh fried full garden general geometric giant glass gold golden golf
good graham grand-slam gray green grey grilled happy hardcover healthy heavy history home horizontal hot human ideal
identical imaginary important incorrect independent individual integer integral invalid invertible invited iron
irrational isosceles jumbo jumping junk large lattice leather left-handed legal light little local long lucky magic
male marked math medium metal mini minor missing mixed monthly movie national natural new noble non-empty non-zero
nonempty nonzero normal obtuse odd old open orange ordered original ornamental outer palindromic paper parallel
parking paved permissible perpendicular pickled pink plain planted plastic playing pokemon polite popsicle positive
possible precious premium present previous prime proper public pure purple quality racing random rare rational raw
real rectangular recyclable red reduced regular relevant remaining rented repeated required right right-handed ripe
rolling rotten round rubber running sad safe saltwater salty scalene scented seasoned senior separate shiny short
silver simple single skilled sleeping slow small soccer soft solid sour spare special stale standard steel straight
striped stuffed such suitable summer super sushi sweet tall teddy tennis thick thin three-digit tiny toy trading trail
trailing triangular trivial two-digit typical unbiased uncommon unique unit unmarked unordered unpainted unread unripe
unused upright used useful usual vacant valid valuable vertical washing wet white whole wide wild winning winter
wooden wrong yearly yellow young
"""

NOUNS = frozenset(f"{_PEOPLE}{_ANIMALS}{_FOOD}{_OBJECTS}{_PLACES_AND_PARTS}{_GROUPS_AND_EVENTS}{_MATHEMATICS}".split())
SAME_IN_PLURAL = frozenset(_SAME_IN_PLURAL.split())
SUBSTANCES = frozenset(_SUBSTANCES.split())
ADJECTIVES = frozenset(_ADJECTIVES.split())
# Nouns only where the words beside them show that mathematical objects are counted: ordered pairs, pairs of integers.
TUPLES = frozenset(["pair", "triple", "triplet", "quadruple", "quadruplet", "quintuple", "tuple"])
IRREGULAR = {
    "children": "child", "dice": "die", "feet": "foot", "fishermen": "fisherman", "firemen": "fireman",
    "freshmen": "freshman", "geese": "goose", "grandchildren": "grandchild", "men": "man", "mice": "mouse",
    "oxen": "ox", "people": "person", "policemen": "policeman", "snowmen": "snowman", "teeth": "tooth",
    "women": "woman", "axes": "axis", "matrices": "matrix", "vertices": "vertex", "extrema": "extremum",
    "bacteria": "bacterium", "quanta": "quantum", "polyhedra": "polyhedron", "tetrahedra": "tetrahedron",
    "aquaria": "aquarium", "octopi": "octopus", "quizzes": "quiz", "rhombi": "rhombus", "lenses": "lens",
}  # fmt: skip
