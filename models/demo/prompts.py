"""What the stories are about: endless, reproducible combinations of who, where, what and how.

Pure; knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

ANIMALS = """ant|badger|bat|bear|beaver|bee|beetle|bird|bunny|butterfly|camel|cat|caterpillar|chick|chicken
cow|crab|cricket|crow|deer|dog|dolphin|donkey|dragonfly|duck|duckling|eagle|elephant|fish|firefly|foal|fox
frog|giraffe|goat|goose|grasshopper|hamster|hedgehog|hen|hippo|horse|jellyfish|kangaroo|kitten|koala|ladybug
lamb|lion|lizard|lobster|mole|monkey|moose|mouse|octopus|otter|owl|ox|panda|parrot|peacock|penguin|pig
pigeon|pony|puppy|rabbit|raccoon|rat|robin|rooster|seahorse|seal|shark|sheep|snail|snake|sparrow|spider
squirrel|starfish|stork|swan|tiger|toad|tortoise|turkey|turtle|walrus|whale|wolf|woodpecker|worm|zebra"""
PEOPLE = """artist|astronaut|baker|bee keeper|boy|bus driver|captain|carpenter|child|clown|cook|dancer
doctor|farmer|firefighter|fisherman|gardener|giant|girl|grandfather|grandmother|hiker|inventor|king|knight
librarian|lighthouse keeper|magician|mail carrier|mechanic|miller|musician|nurse|old man|old woman|painter
pilot|pirate|poet|potter|prince|princess|queen|sailor|scientist|shepherd|shoemaker|shopkeeper|singer|student
tailor|teacher|toy maker|train driver|traveler|twin|watchmaker|weaver|wizard|woodcutter"""
THINGS = """boat|broom|candle|car|clock|cloud|doll|dragon|fairy|ghost|kite|lamp|lantern|little star
little tree|moon|paper boat|pencil|raindrop|robot|rocking horse|sailing ship|scarecrow|snowflake|snowman
star|steam train|sunflower|teapot|teddy bear|toy soldier|tractor|truck|umbrella|wind"""
TRAITS = """brave|bright|busy|careful|careless|cheerful|clever|clumsy|curious|forgetful|friendly|funny
gentle|greedy|grumpy|happy|helpful|honest|hungry|jealous|kind|lazy|little|lonely|loud|lucky|messy|noisy|old
patient|playful|polite|poor|proud|quiet|rich|sad|shy|silly|sleepy|slow|small|smart|stubborn|tall|thoughtful
tiny|tired|wise|worried|young"""
PLACES = """on a farm|in a big city|in a small village|in a deep forest|by the sea|on an island
in the mountains|in a castle|at school|in a garden|at the park|in a kitchen|at the zoo|in a desert|on a boat
under the sea|in a jungle|at the beach|on a train|in a library|in a toy shop|at a market|in a cave
near a river|by a lake|in a treehouse|in an old house|on the moon|in a bakery|in a snowy valley
at the circus|in a hospital|at a birthday party|in a barn|on a hill|in a meadow|at the airport|in a museum
in a small town|under a bridge|in a lighthouse|in a tall tower|in a classroom|on a mountain path
in a cottage|at a pond|in a field of corn|in the rain|in the backyard|in a workshop|on a busy street"""
EVENTS = """finds an old key|loses a favorite toy|learns to swim|makes a new friend|gets lost
helps a stranger|bakes a cake|builds a house|plants a seed|tells a lie|learns to share|finds a treasure map
is afraid of the dark|hears a strange noise|goes on a long journey|wins a race|breaks a vase
finds a lost puppy|visits the doctor|goes fishing|flies a kite|learns to read|learns to ride a bike
waits for the rain to stop|makes a wish|paints a picture|misses the bus|gives away a coat|saves a friend
has a bad dream|finds a magic stone|makes a big mistake|says sorry to a friend|learns to be patient
catches a cold|finds a secret door|sings in front of a crowd|looks for the moon|builds a boat
plays a trick on a friend|has too much to do|wants to be bigger|wants to fly|meets a dragon|shares a meal
cleans a messy room|fixes a broken clock|follows a map|climbs a tall tree|gets stuck in the mud
receives a letter|throws a party|counts the stars|goes camping|learns to cook soup|finds a baby bird
crosses a river|sees snow for the first time|moves to a new home|starts school|takes care of a sick friend
tries a new food|wants to win a prize|digs a deep hole|meets a talking tree|helps with the harvest
gets a surprise gift|loses a tooth|buys a hat|sells apples|learns to say no|breaks a promise|keeps a secret
finds a coin|opens a mysterious box|hides from the storm|learns to play the drum|forgets an important day
makes a bridge|saves the village from a flood|wakes up late|sleeps under the stars
makes a kite from old paper|asks too many questions|finds a hidden garden|teaches a friend to dance
follows a butterfly|trades a toy|grows a giant pumpkin|rides a train|looks for honey|gets a new brother
wants to stay awake all night|loses a shoe|saves some money|finds a message in a bottle"""
OBJECTS = """apple|ball|balloon|basket|bell|blanket|book|bottle|box|bread|bridge|bucket|button|cake|candle
carrot|chair|cheese|coat|cookie|cup|door|drum|egg|feather|fence|flag|flower|flute|gate|guitar|hammer|hat
honey|jar|key|kite|ladder|lamp|leaf|letter|map|mirror|mitten|nest|oar|orange|paint|pear|pie|pillow|pot
puddle|puzzle|ribbon|ring|rock|rope|sandwich|scarf|seed|shell|shoe|shovel|soup|spoon|stone|sword|table|tent
ticket|toy|tree|umbrella|violin|wagon|wheel|whistle|window"""
FEATURES = """Let the characters talk to each other.|The story has a happy ending.
The story ends with a surprise.|Something goes wrong.|Show how the character feels.|It should be funny.
It should be gentle and calm, for bedtime.|It should teach a small lesson.|Say what the weather is like.
A friend helps to solve a problem.|Someone changes their mind.|The story is about being kind.
The story is about being brave.|The story is about telling the truth.|The story is about trying again.
The story is about working together.|It all happens in one day.|It happens at night.|It happens in winter.
It happens in spring.|It happens in summer.|It happens in autumn."""
NAMES = """Ada|Adam|Ali|Alice|Amara|Amy|Ana|Anna|Anton|Arjun|Asha|Ava|Bella|Ben|Beth|Billy|Bo|Bruno|Carla
Carlos|Cleo|Clara|Dan|Daisy|Dara|David|Diego|Dina|Ella|Elena|Eli|Elsa|Emil|Emma|Eric|Eva|Fatima|Felix|Finn
Fred|George|Gina|Grace|Greta|Hana|Hank|Harry|Hassan|Henry|Hugo|Ida|Igor|Ines|Ivan|Jack|Jada|James|Jane
Jasper|Jay|Jill|Joe|John|Jonas|Josie|Jun|Karl|Kate|Kai|Kim|Lara|Leo|Lena|Lila|Lily|Lina|Liz|Lola|Lucas|Lucy
Luna|Mae|Mara|Marco|Maria|Mark|Mary|Mateo|Max|Maya|Mei|Mia|Mila|Milo|Mina|Mohan|Molly|Nadia|Nan|Ned|Nia|Nick
Nico|Nina|Noah|Nora|Olga|Oliver|Omar|Oscar|Otto|Pam|Paul|Pedro|Penny|Peter|Pia|Pip|Polly|Priya|Rani|Ravi
Rita|Rob|Rosa|Ruby|Ruth|Sam|Sana|Sara|Sasha|Simon|Sofia|Sol|Stella|Sue|Tara|Ted|Tess|Theo|Tim|Tina|Toby|Tom
Tomas|Uma|Vera|Vic|Wanda|Will|Willa|Yara|Yuki|Zack|Zara|Zoe"""
REQUESTS = """Write a very short story for young children about {who} named {name} who {event} {place}.
Tell a short, simple story: {who} named {name} {event} {place}.
Write a short story for a four-year-old. In it, {who} called {name} {event}. It takes place {place}.
Write a simple children's story with two characters, {who} named {name} and {other} named {friend}. {name} {event} {place}.
Write a short story about {name} and {friend}, {place}. In the story {name} {event}.
Write a short story for children that uses the words "{object}" and "{object2}". It is about {who} named {name}.
Write a very short children's story about {who} and {other} who find {an_object} {place}.
Write a short and simple story about {who} named {name} and {an_object}. It happens {place}."""  # noqa: E501
STYLES = """Use simple words and short, complete sentences. Write about 120 words, without a title.
Use simple words and short, complete sentences. Write about 150 words.|Write about 120 words.
Use simple language."""
OPENERS = """Once upon a time, there was|Once upon a time, {place}, there was|Once upon a time,
Once upon a time|Once upon a time, there lived|Once upon a time there was {who}
Once upon a time, there was {who}|Once upon a time, {who} named {name}
Once upon a time, there was {who} named {name}."""
OTHER_OPENERS = """One day,|One day, {name}|One morning,|One sunny day,|One rainy day,|One night,|It was a
It was a cold day|It was|{name} was|{name} was {who}.|{name} had|{name} lived|{name} and {friend} were
{name} and {friend}|There was once|There once was {who}|In a|A long time ago,|Long ago,|Every day,
Every morning,|Last summer,|{name} loved|{name} wanted|{name} liked to|{name} did not|{name} looked
"Look!" said {name}.|"|My name is {name}.|The|The {object}|When {name}|After|Early|On a|Deep in|Far away,
There was {an_object}|Today|On Monday,|{name} woke up|All the|Nobody|Two friends,|Mother|Grandma|The sun was
The rain|That day,"""


def choices(text: str) -> list[str]:
    """The entries of one of the tables above."""
    return [part for line in text.split("\n") for part in line.split("|")]


def with_article(noun: str) -> str:
    """ "a fox", "an owl"."""
    return f"an {noun}" if noun[0] in "aeio" or noun.startswith(("umb", "ugl")) else f"a {noun}"


def requests(seed: int, once: float = 0.45) -> Iterator[tuple[str, str]]:
    """Endless pairs: what to ask the model for, and the words that the story begins with.

    A share `once` of the stories begins with "Once upon a time".
    """
    rng = random.Random(seed)
    kinds = [choices(ANIMALS), choices(PEOPLE), choices(THINGS)]
    traits, places, events = choices(TRAITS), choices(PLACES), choices(EVENTS)
    objects, features, names = choices(OBJECTS), choices(FEATURES), choices(NAMES)
    asks, styles = REQUESTS.split("\n"), choices(STYLES)
    openers, others = choices(OPENERS), choices(OTHER_OPENERS)

    def someone() -> str:
        noun = rng.choice(rng.choices(kinds, weights=(5, 4, 2))[0])
        return with_article(f"{rng.choice(traits)} {noun}" if rng.random() < 0.7 else noun)

    while True:
        name, friend = rng.sample(names, 2)
        object1, object2 = rng.sample(objects, 2)
        words = {
            "who": someone(), "other": someone(), "name": name, "friend": friend, "place": rng.choice(places),
            "event": rng.choice(events), "object": object1, "object2": object2,
            "an_object": with_article(object1),
        }  # fmt: skip
        ask = rng.choice(asks)
        extra = " " + rng.choice(features) if rng.random() < 0.6 else ""
        opener = rng.choice(openers if rng.random() < once else others)
        yield ask.format(**words) + extra + " " + rng.choice(styles), opener.format(**words)
