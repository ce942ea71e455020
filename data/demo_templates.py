"""Word pools and sentence templates of the demo's made-up news.

A template is a format string. `{place}`, `{person}` ... name slots of its event. `{other_place}`,
`{other_person}`, `{other_firm}`, `{other_number}` and `{other_day}` stand for competing values: names and numbers
that no key fact of the article holds.

Rules that the tests check:
- no template starts with a slot, so that a value always follows a space and always has the same token or tokens;
- all wordings of a key fact, and of the highlight that belongs to it, hold the same one or two slots;
- the article before a slot never depends on its value ("a {building}": no building begins with a vowel).

All places and firms are invented.
"""

from typing import NamedTuple


class Event(NamedTuple):
    """One kind of news.

    slots: name of each slot of the key facts -> name of the pool its value comes from.
    facts: three key facts, three wordings each, for the article.
    highlights: for each key fact, two wordings that differ from the article's.
    distractors: five sentences of the same kind that hold no key fact.
    """

    slots: dict[str, str]
    facts: tuple[tuple[str, ...], ...]
    highlights: tuple[tuple[str, ...], ...]
    distractors: tuple[str, ...]


POOLS = {
    # Few beginnings and endings make many names: the byte-pair merges they share leave room for whole names.
    "place": (
        "Ashdale Ashford Ashmont Ashwick Belford Belmont Belton Belwick Brandale Branford Branmont Branton Cordale "
        "Corford Cormont Corwick Dundale Dunford Dunton Dunwick Elmdale Elmford Elmton Elmwick Fardale Farmont Farton "
        "Farwick Kelford Kelmont Kelton Kelwick Mardale Marford Marmont Marwick Nordale Norford Normont Norton "
        "Seldale Selford Selmont Selwick Windale Winford Winton Winwick Oakdale Oakton"
    ).split(),
    "first": (
        "Anna Boris Carla Clara Daniel David Elena Emma Erik Frank Grace Hanna Helen Hugo Irene Jonas Julia Karin "
        "Laura Leon Maria Martin Nadia Nina Oscar Paula Peter Robert Sara Victor"
    ).split(),
    "last": (
        "Adams Baker Berg Brandt Carter Cole Costa Cruz Diaz Evans Fischer Garcia Grant Hansen Hayes Jensen Keller Kim "
        "Lane Lopez Marsh Meyer Moore Morris Nash Novak Owens Perez Price Reed Rossi Santos Shaw Silva Singh Tanaka "
        "Torres Vega Ward Weber"
    ).split(),
    "firm": (
        "Bricor Bridyne Brilux Calcor Caldyne Callux Dexcor Dexdyne Dexlux Fencor Fendyne Fenlux Lumcor Lumdyne Lumlux "
        "Novcor Novdyne Novlux Palcor Paldyne Pallux Tricor Tridyne Trilux Velcor Veldyne Vellux Zencor Zendyne Zenlux"
    ).split(),
    # Two digits and not too many of them: each number becomes one token, and a token is what a small model can copy.
    "number": [str(number) for number in range(12, 60)],
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "product": "bicycles blankets cameras heaters helmets kettles ladders lamps ovens phones toasters tyres".split(),
    "building": "bridge harbour hospital library market museum school stadium station theatre tower tunnel".split(),
}

EVENTS = {
    "earthquake": Event(
        slots={"place": "place", "day": "day", "injured": "number", "person": "person", "homes": "number"},
        facts=(
            (
                "A strong earthquake struck near {place} on {day}.",
                "The ground shook around {place} early on {day}.",
                "An earthquake was felt in the town of {place} on {day}.",
            ),
            (
                "Doctors treated {injured} people for injuries.",
                "At least {injured} people were injured, the hospital said.",
                "The hospital took in {injured} injured people.",
            ),
            (
                "Mayor {person} said {homes} homes were destroyed.",
                "The mayor, {person}, counted {homes} destroyed homes.",
                "According to Mayor {person}, {homes} homes fell down.",
            ),
        ),
        highlights=(
            ("A powerful quake hits {place} on {day}.", "The {place} region is shaken by a quake {day}."),
            ("About {injured} residents are hurt.", "The quake leaves {injured} residents hurt."),
            ("The damage: {homes} houses lost, says {person}.", "A total of {homes} houses are ruined, says {person}."),
        ),
        distractors=(
            "An earlier earthquake near {other_place} killed {other_number} people.",
            "Trains to {other_place} were stopped for {other_number} hours.",
            "The expert {other_person} warned of more small shocks.",
            "Schools in {other_place} will stay closed until {other_day}.",
            "Rescue teams brought tents, food and clean water.",
        ),
    ),
    "court": Event(
        slots={"place": "place", "person": "person", "months": "number", "millions": "number", "firm": "firm"},
        facts=(
            (
                "A court in {place} found {person} guilty of fraud.",
                "Judges in {place} ruled that {person} was guilty of fraud.",
                "After a trial in {place}, {person} was found guilty of fraud.",
            ),
            (
                "The sentence is {months} months in prison.",
                "The judge ordered {months} months in prison.",
                "The prison term was set at {months} months.",
            ),
            (
                "Court papers show that {millions} million dollars were taken from {firm}.",
                "The court heard that {firm} had lost {millions} million dollars.",
                "Some {millions} million dollars were missing at {firm}.",
            ),
        ),
        highlights=(
            ("A jury in {place} convicts {person}.", "The verdict in {place} goes against {person}."),
            ("The defendant faces {months} months behind bars.", "A stay of {months} months behind bars follows."),
            ("The scheme cost {firm} about {millions} million.", "The damage to {firm} is put at {millions} million."),
        ),
        distractors=(
            "The lawyer, {other_person}, said there would be an appeal.",
            "A former manager of {other_firm} spoke as a witness.",
            "The trial had lasted {other_number} days.",
            "A similar case in {other_place} was closed on {other_day}.",
            "The room was full from early morning.",
        ),
    ),
    "election": Event(
        slots={"place": "place", "person": "person", "percent": "number", "schools": "number", "day": "day"},
        facts=(
            (
                "Voters in {place} chose {person} as mayor.",
                "The election in {place} was won by {person}.",
                "The people of {place} elected {person} as mayor.",
            ),
            (
                "The winner received {percent} percent of the vote.",
                "The final count gave the winner {percent} percent.",
                "The winner had a vote share of {percent} percent.",
            ),
            (
                "Work on {schools} new schools should begin on {day}.",
                "The plan for {schools} new schools starts on {day}.",
                "The winner promised {schools} new schools, starting on {day}.",
            ),
        ),
        highlights=(
            ("A victory in {place} for {person}.", "The city hall of {place} goes to {person}."),
            ("About {percent} percent of ballots back the victor.", "The victor takes {percent} percent of ballots."),
            ("A project for {schools} schools follows {day}.", "The city will get {schools} schools from {day}."),
        ),
        distractors=(
            "The rival, {other_person}, accepted the result.",
            "Only {other_number} percent of young people took part.",
            "The vote in {other_place} was moved to {other_day}.",
            "Much of the campaign was paid for by {other_firm}.",
            "Long lines formed outside the voting rooms.",
        ),
    ),
    "results": Event(
        slots={"firm": "firm", "millions": "number", "percent": "number", "person": "person", "place": "place"},
        facts=(
            (
                "The company {firm} made a profit of {millions} million dollars.",
                "The profit at {firm} reached {millions} million dollars.",
                "A profit of {millions} million dollars was reported by {firm}.",
            ),
            (
                "Sales rose by {percent} percent over the year.",
                "Sales were {percent} percent higher than last year.",
                "The company sold {percent} percent more than last year.",
            ),
            (
                "The chief executive, {person}, will open a plant in {place}.",
                "The chief executive, {person}, plans a new plant in {place}.",
                "A new plant in {place} was announced by {person}.",
            ),
        ),
        highlights=(
            ("The {firm} group earns {millions} million.", "A strong year brings {firm} about {millions} million."),
            ("The group grows by {percent} percent.", "Its growth is put at {percent} percent."),
            ("A factory is coming to {place}, says {person}.", "The head, {person}, picks {place} for a factory."),
        ),
        distractors=(
            "Shares of {other_firm} fell by {other_number} percent.",
            "The expert {other_person} had expected less.",
            "An office in {other_place} will be closed on {other_day}.",
            "The rival {other_firm} made {other_number} million dollars.",
            "High energy prices are still a worry.",
        ),
    ),
    "storm": Event(
        slots={"place": "place", "day": "day", "thousands": "number", "person": "person", "people": "number"},
        facts=(
            (
                "A heavy storm reached {place} on {day}.",
                "Strong winds moved over {place} on {day}.",
                "The coast near {place} was struck by a storm on {day}.",
            ),
            (
                "Power was lost in {thousands} thousand homes.",
                "Some {thousands} thousand homes had no power.",
                "The storm cut power to {thousands} thousand homes.",
            ),
            (
                "The fire chief, {person}, said {people} people were taken to shelters.",
                "The fire chief, {person}, moved {people} people to shelters.",
                "Crews under {person} brought {people} people to shelters.",
            ),
        ),
        highlights=(
            ("A gale hits {place} on {day}.", "The {place} region faces a gale {day}."),
            ("About {thousands} thousand families sit in the dark.", "It is dark for {thousands} thousand families."),
            ("A team led by {person} saves {people} residents.", "The team of {person} gets {people} residents out."),
        ),
        distractors=(
            "An earlier storm near {other_place} lasted {other_number} hours.",
            "Trains to {other_place} should run again on {other_day}.",
            "The expert {other_person} warned of more rain.",
            "Workers from {other_firm} cut up {other_number} fallen trees.",
            "Many roads near the coast are under water.",
        ),
    ),
    "rescue": Event(
        slots={"hikers": "number", "place": "place", "hours": "number", "person": "person", "day": "day"},
        facts=(
            (
                "Rescue teams found {hikers} hikers alive near {place}.",
                "A group of {hikers} hikers was found in the hills near {place}.",
                "Rescue crews reached {hikers} lost hikers near {place}.",
            ),
            (
                "The group had been in the snow for {hours} hours.",
                "They had spent {hours} hours in the snow.",
                "The hikers waited {hours} hours for help.",
            ),
            (
                "The guide, {person}, had called for help on {day}.",
                "A call from the guide, {person}, came on {day}.",
                "The guide, {person}, had reached a radio on {day}.",
            ),
        ),
        highlights=(
            ("A search at {place} saves {hikers} walkers.", "The {hikers} missing walkers are safe at {place}."),
            ("The cold ordeal took {hours} hours.", "It was an ordeal of {hours} hours."),
            ("The alarm was raised by {person} {day}.", "Their leader, {person}, raised the alarm {day}."),
        ),
        distractors=(
            "A doctor, {other_person}, said all of them were tired.",
            "Some {other_number} people from {other_place} had joined the work.",
            "Two helicopters came from a base in {other_place}.",
            "The paths will stay closed until {other_day}.",
            "Heavy snow had covered every path.",
        ),
    ),
    "recall": Event(
        slots={"firm": "firm", "product": "product", "fires": "number", "place": "place", "day": "day"},
        facts=(
            (
                "The company {firm} is calling back its {product}.",
                "The company {firm} has stopped selling its {product}.",
                "People who own {product} made by {firm} should return them.",
            ),
            (
                "There were {fires} reports of fire.",
                "The company knows of {fires} fires.",
                "At least {fires} of them caught fire.",
            ),
            (
                "Tests in {place} showed the fault on {day}.",
                "Experts in {place} found the fault on {day}.",
                "The fault was found at a plant in {place} on {day}.",
            ),
        ),
        highlights=(
            ("A recall of {product} begins at {firm}.", "The {product} from {firm} are not safe."),
            ("About {fires} items have burned.", "The number of burned items is put at {fires}."),
            ("A team in {place} spotted the problem {day}.", "The problem came to light in {place} {day}."),
        ),
        distractors=(
            "Shops in {other_place} will give the money back.",
            "The rival {other_firm} said its own were not affected.",
            "A spokesman, {other_person}, said he was sorry.",
            "A phone line will be open from {other_day}.",
            "Each of them had cost {other_number} dollars.",
        ),
    ),
    "building": Event(
        slots={"place": "place", "building": "building", "firm": "firm", "millions": "number", "months": "number"},
        facts=(
            (
                "The city of {place} will build a new {building}.",
                "Plans for a new {building} in {place} were accepted.",
                "The council of {place} voted for a new {building}.",
            ),
            (
                "The company {firm} will do the work for {millions} million dollars.",
                "A contract of {millions} million dollars went to {firm}.",
                "Workers from {firm} will build it for {millions} million dollars.",
            ),
            (
                "The work should take {months} months.",
                "The plan gives the workers {months} months.",
                "It should be finished in {months} months.",
            ),
        ),
        highlights=(
            ("A {building} is coming to {place}.", "The people of {place} get a {building}."),
            (
                "The project brings {firm} about {millions} million.",
                "The bill from {firm} is put at {millions} million.",
            ),
            ("The opening is {months} months away.", "Its opening follows {months} months later."),
        ),
        distractors=(
            "An earlier plan by {other_firm} was found too costly.",
            "The designer, {other_person}, also worked in {other_place}.",
            "Some {other_number} people spoke against the plan.",
            "The next public meeting is on {other_day}.",
            "Several old trees will have to be cut.",
        ),
    ),
}

GENERIC = (
    "More news is expected on {other_day}.",
    "Many people shared pictures of it.",
    "A report from {other_place} gave no more news.",
    "The news was first reported by a local radio.",
    "A meeting is planned in {other_place}.",
    "The minister, {other_person}, had no answer yet.",
    "Local people said they were surprised.",
    "The weather was mild for most of the day.",
    "Some {other_number} reporters came to the town.",
    "Nobody from {other_firm} was there.",
    "Officials will speak again later.",
    "The roads were quiet on {other_day}.",
)
