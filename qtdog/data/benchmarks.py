"""What DomainBed's five sets of pictures hold: folders, domains, classes, numbers of images.

The numbers of images are DomainBed's totals (Gulrajani & Lopez-Paz, 2021, and its `domain_net_duplicates.txt`), by
domain from the data sets' own papers and lists; PACS by class from its official split files. TerraIncognita is the
version of those papers: what its download gives today has 24,330 images (khanrc/miro, issue 9).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Benchmark:
    """One data set by DomainBed's names.

    Attributes:
        folder: its folder under the data root.
        images: number of images of each domain.
        class_names: separated by white space.
        spellings: other names that folders go by, beyond case and separators.
        class_images: number of images of each class by domain, where it is known.
    """

    folder: str
    images: dict[str, int]
    class_names: str
    spellings: dict[str, list[str]] = field(default_factory=dict)
    class_images: dict[str, list[int]] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """In the lexicographic order that numbers them."""
        return sorted(self.class_names.split())


OFFICE_HOME_CLASSES = """
    Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer
    Couch Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer
    Helmet Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen
    Pencil Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda
    Speaker Spoon TV Table Telephone ToothBrush Toys Trash_Can Webcam
"""

DOMAIN_NET_CLASSES = """
    The_Eiffel_Tower The_Great_Wall_of_China The_Mona_Lisa aircraft_carrier airplane alarm_clock ambulance angel
    animal_migration ant anvil apple arm asparagus axe backpack banana bandage barn baseball baseball_bat basket
    basketball bat bathtub beach bear beard bed bee belt bench bicycle binoculars bird birthday_cake blackberry
    blueberry book boomerang bottlecap bowtie bracelet brain bread bridge broccoli broom bucket bulldozer bus bush
    butterfly cactus cake calculator calendar camel camera camouflage campfire candle cannon canoe car carrot castle
    cat ceiling_fan cell_phone cello chair chandelier church circle clarinet clock cloud coffee_cup compass computer
    cookie cooler couch cow crab crayon crocodile crown cruise_ship cup diamond dishwasher diving_board dog dolphin
    donut door dragon dresser drill drums duck dumbbell ear elbow elephant envelope eraser eye eyeglasses face fan
    feather fence finger fire_hydrant fireplace firetruck fish flamingo flashlight flip_flops floor_lamp flower
    flying_saucer foot fork frog frying_pan garden garden_hose giraffe goatee golf_club grapes grass guitar
    hamburger hammer hand harp hat headphones hedgehog helicopter helmet hexagon hockey_puck hockey_stick horse
    hospital hot_air_balloon hot_dog hot_tub hourglass house house_plant hurricane ice_cream jacket jail kangaroo
    key keyboard knee knife ladder lantern laptop leaf leg light_bulb lighter lighthouse lightning line lion
    lipstick lobster lollipop mailbox map marker matches megaphone mermaid microphone microwave monkey moon mosquito
    motorbike mountain mouse moustache mouth mug mushroom nail necklace nose ocean octagon octopus onion oven owl
    paint_can paintbrush palm_tree panda pants paper_clip parachute parrot passport peanut pear peas pencil penguin
    piano pickup_truck picture_frame pig pillow pineapple pizza pliers police_car pond pool popsicle postcard potato
    power_outlet purse rabbit raccoon radio rain rainbow rake remote_control rhinoceros rifle river roller_coaster
    rollerskates sailboat sandwich saw saxophone school_bus scissors scorpion screwdriver sea_turtle see_saw shark
    sheep shoe shorts shovel sink skateboard skull skyscraper sleeping_bag smiley_face snail snake snorkel snowflake
    snowman soccer_ball sock speedboat spider spoon spreadsheet square squiggle squirrel stairs star steak stereo
    stethoscope stitches stop_sign stove strawberry streetlight string_bean submarine suitcase sun swan sweater
    swing_set sword syringe t-shirt table teapot teddy-bear telephone television tennis_racquet tent tiger toaster
    toe toilet tooth toothbrush toothpaste tornado tractor traffic_light train tree triangle trombone truck trumpet
    umbrella underwear van vase violin washing_machine watermelon waterslide whale wheel windmill wine_bottle
    wine_glass wristwatch yoga zebra zigzag
"""

BENCHMARKS = {
    "PACS": Benchmark(
        "PACS",
        {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
        "dog elephant giraffe guitar horse house person",
        spellings={"PACS": ["kfold"]},
        class_images={
            "art_painting": [379, 255, 285, 184, 201, 295, 449],
            "cartoon": [389, 457, 346, 135, 324, 288, 405],
            "photo": [189, 202, 182, 186, 199, 280, 432],
            "sketch": [772, 740, 753, 608, 816, 80, 160],
        },
    ),
    "VLCS": Benchmark(
        "VLCS",
        {"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376},
        "bird car chair dog person",
        spellings={
            **{"Caltech101": ["caltech"], "SUN09": ["sun"], "VOC2007": ["voc", "pascal"]},
            **{"bird": ["0"], "car": ["1"], "chair": ["2"], "dog": ["3"], "person": ["4"]},
        },
    ),
    "OfficeHome": Benchmark(
        "office_home",
        {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
        OFFICE_HOME_CLASSES,
        spellings={"office_home": ["office_home_dg", "OfficeHomeDataset_10072016"]},
    ),
    "TerraIncognita": Benchmark(
        "terra_incognita",
        {"location_100": 4879, "location_38": 9767, "location_43": 4020, "location_46": 6122},
        "bird bobcat cat coyote dog empty opossum rabbit raccoon squirrel",
        spellings={f"location_{number}": [f"L{number}"] for number in (100, 38, 43, 46)},
    ),
    "DomainNet": Benchmark(
        "domain_net",
        {
            "clipart": 48129,
            "infograph": 51605,
            "painting": 72266,
            "quickdraw": 172500,
            "real": 172947,
            "sketch": 69128,
        },
        DOMAIN_NET_CLASSES,
    ),
}
